defmodule Bridge.Wire.Conn do
  @moduledoc false
  # One comm with a kernel, as a value: what to send, and what a message that came means. Pure; the process that owns the
  # sockets (`Bridge.Kernel`) does what it says.

  alias Bridge.{Error, JSON}
  alias Bridge.Wire.{Frames, RPC}

  @derive {Inspect, only: [:comm_id, :next, :dropped]}
  @enforce_keys [:key, :session, :comm_id]
  defstruct [
    :key,
    :session,
    :comm_id,
    :limits,
    next: 1,
    waiting: %{},
    seen: nil,
    max_bytes: 0x1000_0000,
    dropped: 0
  ]

  @type t :: %__MODULE__{}
  @type channel :: :shell | :control
  @type out :: {channel(), [iodata()]}
  @type event ::
          :welcome
          | {:answer, owner :: term(), {:ok, map(), [binary()]} | {:error, Error.t()}}
          | {:callback, command :: integer() | nil, id :: RPC.id(), method :: String.t(), map(), [binary()]}
          | {:notification, command :: integer() | nil, method :: String.t(), map(), [binary()]}
          | {:output, command :: integer() | nil, name :: String.t(), text :: String.t()}
          | {:display, command :: integer() | nil, map(), update :: boolean()}
          | :closed
          | {:dropped, atom()}

  # What is added to a command's parameters by the frames around it.
  @headroom 65_536
  @most_digits 20

  @spec new(binary(), keyword()) :: t()
  def new(key, opts \\ []) do
    %__MODULE__{
      key: key,
      session: hex(16),
      comm_id: hex(16),
      seen: Frames.seen_new(),
      max_bytes: Keyword.get(opts, :max_message_bytes, 0x1000_0000)
    }
  end

  defp hex(bytes), do: Base.encode16(:crypto.strong_rand_bytes(bytes), case: :lower)

  @doc "The topic to subscribe to, before anything is sent."
  @spec topic(t()) :: String.t()
  def topic(conn), do: "comm-" <> conn.comm_id

  @doc "The handshake: its answer goes to `owner`."
  @spec open(t(), term()) :: {t(), out()}
  def open(conn, owner) do
    params = %{
      "protocol" => [1, 0],
      "host" => %{"name" => "bridge_host (Elixir)", "version" => version(), "pid" => pid()},
      "capabilities" => []
    }

    data = conn.next |> RPC.request("bridge.attach", params) |> JSON.encode!()
    {id, conn} = take_id(conn, owner)
    {conn, {:shell, pack(conn, id, "comm_open", Frames.comm_open(conn.comm_id, "bridge.v1", data), [])}}
  end

  defp version, do: (Application.spec(:bridge_host, :vsn) || ~c"0") |> to_string()
  defp pid, do: System.pid() |> String.to_integer()

  @doc """
  A command; its answer goes to `owner`. `params` is a JSON object, encoded.

  `:limit_exceeded` if the kernel does not take so much.
  """
  @spec request(t(), term(), String.t(), iodata(), [binary()]) :: {:ok, t(), integer(), out()} | {:error, Error.t()}
  def request(conn, owner, method, params, buffers) do
    with :ok <- check_size(conn, method, params, buffers) do
      {id, conn} = take_id(conn, owner)
      data = [~s({"jsonrpc":"2.0","id":), Integer.to_string(id), ~s(,"method":"), method, ~s(","params":), params, ?}]
      {:ok, conn, id, {:shell, pack(conn, id, "comm_msg", Frames.comm_message(conn.comm_id, data), buffers)}}
    end
  end

  @doc "Who waited for that answer waits no more."
  @spec forget(t(), integer()) :: t()
  def forget(conn, id), do: %{conn | waiting: Map.delete(conn.waiting, id)}

  @doc "The owner of a command that runs."
  @spec owner(t(), integer() | nil) :: term() | nil
  def owner(conn, id), do: Map.get(conn.waiting, id)

  @spec notify(t(), channel(), String.t(), map()) :: {t(), out()}
  def notify(conn, channel, method, params) do
    {id, conn} = take_id(conn, nil)
    data = method |> RPC.notification(params) |> JSON.encode!()
    {conn, {channel, pack(conn, id, "comm_msg", Frames.comm_message(conn.comm_id, data), [])}}
  end

  @doc "The answer to a callback: the encoded result with its buffers, or an error. What is too large is refused."
  @spec answer(t(), RPC.id(), {:ok, iodata(), [binary()]} | {:error, Error.t()}) :: {t(), out()}
  def answer(conn, callback, {:ok, result, buffers}) do
    case check_size(conn, "the answer", result, buffers) do
      :ok ->
        data = [~s({"jsonrpc":"2.0","id":), JSON.encode!(callback), ~s(,"result":), result, ?}]
        {id, conn} = take_id(conn, nil)
        {conn, {:shell, pack(conn, id, "comm_msg", Frames.comm_message(conn.comm_id, data), buffers)}}

      {:error, error} ->
        answer(conn, callback, {:error, error})
    end
  end

  def answer(conn, callback, {:error, error}) do
    data = callback |> RPC.failure(error) |> JSON.encode!()
    {id, conn} = take_id(conn, nil)
    {conn, {:shell, pack(conn, id, "comm_msg", Frames.comm_message(conn.comm_id, data), [])}}
  end

  @spec close(t()) :: {t(), out()}
  def close(conn) do
    {id, conn} = take_id(conn, nil)
    {conn, {:shell, pack(conn, id, "comm_close", Frames.comm_close(conn.comm_id), [])}}
  end

  @doc "Asks the kernel's process to end."
  @spec shut_down(t()) :: {t(), out()}
  def shut_down(conn) do
    {id, conn} = take_id(conn, nil)
    {conn, {:control, pack(conn, id, "shutdown_request", ~s({"restart":false}), [])}}
  end

  defp take_id(conn, nil), do: {conn.next, %{conn | next: conn.next + 1}}

  defp take_id(conn, owner),
    do: {conn.next, %{conn | next: conn.next + 1, waiting: Map.put(conn.waiting, conn.next, owner)}}

  defp pack(conn, id, type, content, buffers) do
    Frames.pack(conn.key, "#{conn.session}_#{id}", type, conn.session, content, buffers)
  end

  defp check_size(conn, what, content, buffers) do
    limit = (conn.limits && conn.limits["max_message_bytes"]) || conn.max_bytes
    size = IO.iodata_length(content) + Enum.reduce(buffers, 0, &(byte_size(&1) + &2))

    # Of a kernel that takes little it must not be all there is.
    if size > limit - min(@headroom, div(limit, 2)) do
      Error.error(:limit_exceeded, "#{what} takes #{size} bytes, and its kernel takes #{limit}",
        remedy: "Send less at once, or start kernels with a larger --Policy.max_message_bytes."
      )
    else
      :ok
    end
  end

  @doc "What the kernel says in these frames of iopub. What does not fit the contract is dropped, and says why."
  @spec receive(t(), [binary()]) :: {t(), event()}
  def receive(conn, frames) do
    case Frames.unpack(frames, conn.key, conn.seen, max_bytes: conn.max_bytes) do
      {:ok, message, seen} -> meaning(%{conn | seen: seen}, message.header["msg_type"], message)
      {:error, reason, seen} -> drop(%{conn | seen: seen}, reason)
    end
  end

  defp drop(conn, reason), do: {%{conn | dropped: conn.dropped + 1}, {:dropped, reason}}

  defp meaning(%{comm_id: id} = conn, "comm_msg", %{content: %{"comm_id" => id, "data" => data}} = message) do
    case RPC.decode(data) do
      {:request, id, method, params} when is_integer(id) ->
        # It waits for an answer, whatever it sent.
        params = if is_map(params), do: params, else: %{}
        {conn, {:callback, command(params), id, method, params, message.buffers}}

      {:notification, method, %{} = params} ->
        {conn, {:notification, command(params), method, params, message.buffers}}

      {:result, id, %{} = result} ->
        answered(conn, id, {:ok, result, message.buffers})

      {:failure, id, error} ->
        answered(conn, id, {:error, error})

      _malformed ->
        misfit(conn, data)
    end
  end

  defp meaning(conn, "stream", %{content: %{"name" => name, "text" => text}} = message)
       when name in ["stdout", "stderr"] and is_binary(text) do
    {conn, {:output, parent(conn, message), name, text}}
  end

  defp meaning(conn, type, %{content: %{"data" => %{}} = content} = message)
       when type in ["display_data", "update_display_data"] do
    if is_map(content["transient"] || %{}),
      do: {conn, {:display, parent(conn, message), content, type == "update_display_data"}},
      else: drop(conn, :malformed_message)
  end

  defp meaning(conn, "iopub_welcome", _message), do: {conn, :welcome}
  defp meaning(%{comm_id: id} = conn, "comm_close", %{content: %{"comm_id" => id}}), do: {conn, :closed}
  defp meaning(conn, _type, _message), do: drop(conn, :unknown)

  # If it was to be an answer, there will be no other: who waits is told.
  defp misfit(conn, %{"id" => id} = data) when is_integer(id) and not is_map_key(data, "method") do
    answered(conn, id, Error.error(:internal_error, "the kernel's answer does not fit the contract"))
  end

  defp misfit(conn, _data), do: drop(conn, :malformed_message)

  defp answered(conn, id, answer) do
    case Map.pop(conn.waiting, id) do
      {nil, _waiting} -> drop(conn, :late)
      {owner, waiting} -> {%{conn | waiting: waiting}, {:answer, owner, answer}}
    end
  end

  defp command(%{"command" => id}) when is_integer(id), do: id
  defp command(_params), do: nil

  # Our message ids end in the id of the command.
  defp parent(conn, %{parent: %{"msg_id" => msg_id}}) when is_binary(msg_id) do
    prefix = conn.session <> "_"

    with true <- String.starts_with?(msg_id, prefix) and byte_size(msg_id) <= byte_size(prefix) + @most_digits,
         {id, ""} <- msg_id |> String.replace_prefix(prefix, "") |> Integer.parse() do
      id
    else
      _other -> nil
    end
  end

  defp parent(_conn, _message), do: nil
end
