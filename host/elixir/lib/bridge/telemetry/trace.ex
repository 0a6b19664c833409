defmodule Bridge.Telemetry.Trace do
  @moduledoc """
  Where an event belongs: [W3C trace context](https://www.w3.org/TR/trace-context/).

  The innermost span of a process is in its dictionary (`current/0`, `within/2`); it does not go along into other
  processes by itself: whoever starts one hands the `traceparent/1` on.
  """

  @enforce_keys [:trace_id, :span_id]
  defstruct [:trace_id, :span_id, parent_span_id: nil, sampled: true]

  @type t :: %__MODULE__{
          trace_id: String.t(),
          span_id: String.t(),
          parent_span_id: String.t() | nil,
          sampled: boolean()
        }

  @key :bridge_trace

  @doc """
  A new span beneath a traceparent; or, beneath none, the root of a new trace, of which `sampled` says whether it is
  recorded.

      iex> parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
      iex> trace = Bridge.Telemetry.Trace.child_of(parent)
      iex> {trace.trace_id, trace.parent_span_id, trace.sampled}
      {"0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", false}
  """
  @spec child_of(String.t() | t() | nil, boolean()) :: t()
  def child_of(parent, sampled \\ true)
  def child_of(nil, sampled), do: %__MODULE__{trace_id: hex(16), span_id: hex(8), sampled: sampled}

  def child_of(%__MODULE__{} = parent, _sampled) do
    %__MODULE__{parent | span_id: hex(8), parent_span_id: parent.span_id}
  end

  def child_of(<<_::3-bytes, trace::32-bytes, "-", span::16-bytes, "-", flags::2-bytes>>, _sampled) do
    sampled = rem(String.to_integer(flags, 16), 2) == 1
    %__MODULE__{trace_id: :binary.copy(trace), span_id: hex(8), parent_span_id: :binary.copy(span), sampled: sampled}
  end

  @doc "Whether a text is a `traceparent` header."
  @spec traceparent?(term()) :: boolean()
  def traceparent?(text) do
    shape = ~r/\A(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}\z/
    is_binary(text) and Regex.match?(shape, text)
  end

  @doc "The header that says: beneath this span."
  @spec traceparent(t()) :: String.t()
  def traceparent(%__MODULE__{} = trace) do
    "00-#{trace.trace_id}-#{trace.span_id}-#{if trace.sampled, do: "01", else: "00"}"
  end

  @doc "The innermost span of this process."
  @spec current() :: t() | nil
  def current, do: Process.get(@key)

  @doc "Runs the function with this span as the innermost one."
  @spec within(t() | nil, (() -> result)) :: result when result: term()
  def within(trace, fun) do
    outer = Process.put(@key, trace)

    try do
      fun.()
    after
      if outer, do: Process.put(@key, outer), else: Process.delete(@key)
    end
  end

  @doc "The members of an event's metadata that say so."
  @spec metadata(t()) :: %{trace_id: String.t(), span_id: String.t(), parent_span_id: String.t() | nil}
  def metadata(%__MODULE__{} = trace), do: Map.take(trace, [:trace_id, :span_id, :parent_span_id])

  # No secret: a generator of the process is enough, and costs a tenth of :crypto's.
  defp hex(bytes), do: Base.encode16(:rand.bytes(bytes), case: :lower)
end
