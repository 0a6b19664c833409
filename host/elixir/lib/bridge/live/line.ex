defmodule Bridge.Live.Line do
  @moduledoc """
  The line that a command is told in, alive or settled: as text and as HTML, the same as the Python host's.

      iex> line = %Bridge.Live.Line{subject: "total", elapsed: 1_417_460, state: :ok, kernel: "e4a50daa", callbacks: 1}
      iex> Bridge.Live.Line.text(line)
      "✓ total  1.4 ms · kernel e4a5 · 1 callback"
  """

  import Bridge.Live.Words

  @max_subject 120
  @max_error 300
  @max_message 200
  @worth_saying_ns 10_000_000
  @max_traceback 20_000

  @enforce_keys [:subject, :elapsed]
  defstruct [
    :subject,
    :elapsed,
    state: :running,
    kernel: "",
    queue: 0,
    callbacks: 0,
    lm_calls: 0,
    tokens: 0,
    attempt: 1,
    done: nil,
    total: nil,
    message: "",
    cached: false,
    error: "",
    traceback: ""
  ]

  @typedoc """
  One command. `elapsed` and `queue` in nanoseconds; `:queued` is one that has no kernel yet. `done`, `total` and
  `message` say how far it is; the `traceback` is shown folded, in HTML only.
  """
  @type t :: %__MODULE__{
          subject: String.t(),
          elapsed: non_neg_integer(),
          state: :queued | :running | :ok | :error,
          kernel: String.t(),
          queue: non_neg_integer(),
          callbacks: non_neg_integer(),
          lm_calls: non_neg_integer(),
          tokens: non_neg_integer(),
          attempt: non_neg_integer(),
          done: number() | nil,
          total: number() | nil,
          message: String.t(),
          cached: boolean(),
          error: String.t(),
          traceback: String.t()
        }

  @doc "One line, without a newline."
  @spec text(t()) :: String.t()
  def text(line), do: "#{mark(line.state, line.elapsed)} #{clip(line.subject, @max_subject)}  #{said(line)}"

  @doc "The same, coloured; of a command that has come some of its way a bar, of an error its traceback, folded."
  @spec html(t()) :: String.t()
  def html(line) do
    mark = coloured(line.state, mark(line.state, line.elapsed))
    subject = escape(clip(line.subject, @max_subject))
    told = "#{mark} <b>#{subject}</b> <span style=\"opacity:.75\">#{escape(said(line))}</span>#{share(line)}"
    framed(folded(told, line.traceback))
  end

  defp folded(told, ""), do: told

  defp folded(told, traceback) do
    ~s(<details><summary style="cursor:pointer">#{told}</summary>) <>
      ~s(<pre style="margin:.3em 0 0 1.5em;font-size:11px;white-space:pre-wrap">) <>
      "#{escape(String.slice(traceback, 0, @max_traceback))}</pre></details>"
  end

  defp share(%{state: :running, done: done, total: total}) when is_number(done) and is_number(total) and total != 0 do
    value = (done / total) |> max(0.0) |> min(1.0)
    ~s( <progress value="#{fixed(value, 3)}" max="1" style="width:8em;vertical-align:middle"></progress>)
  end

  defp share(_line), do: ""

  # What is said after the subject, in order.
  defp said(line) do
    settled? = line.state in [:ok, :error]

    [
      if(settled?, do: duration(line.elapsed), else: fixed(line.elapsed / 1.0e9, 1) <> " s"),
      where(line),
      line.kernel != "" && "kernel #{String.slice(line.kernel, 0, 4)}",
      line.cached && "from the cache",
      line.queue >= @worth_saying_ns and line.state != :queued && "queued #{duration(line.queue)}",
      line.attempt > 1 && "attempt #{line.attempt}",
      line.lm_calls > 0 && quantity(line.lm_calls, "LM call") <> tokens(line.tokens),
      line.callbacks > 0 && quantity(line.callbacks, "callback"),
      line.error != "" && clip(line.error, @max_error)
    ]
    |> Enum.filter(&is_binary/1)
    |> Enum.join(" · ")
  end

  defp tokens(0), do: ""
  defp tokens(n), do: ", " <> quantity(n, "token")

  defp where(%{state: :queued}), do: "queued"

  defp where(%{state: :running, done: nil, message: message}) do
    if message != "", do: clip(message, @max_message)
  end

  defp where(%{state: :running} = line) do
    of = if line.total == nil, do: "", else: "/" <> general(line.total)
    clip(String.trim("#{general(line.done)}#{of} #{line.message}"), @max_message)
  end

  defp where(_settled), do: nil
end
