defmodule Bridge.Wire.Peer do
  @moduledoc false
  # A connection to one ZeroMQ socket, as a value: no process of its own. What comes goes to the process that called
  # `connect/3`, as messages that it hands to `stream/2`. Who wants to be connected again connects again.

  import Kernel, except: [send: 2]

  alias Bridge.Wire.ZMTP

  # What has come and is not given out yet is nobody's to see.
  @derive {Inspect, only: [:socket]}
  @enforce_keys [:socket, :zmtp]
  defstruct [:socket, :zmtp, early: []]

  @type address ::
          {:ipc, Path.t()} | {:tcp, :inet.socket_address() | :inet.hostname() | String.t(), :inet.port_number()}
  @type reason :: ZMTP.reason() | :timeout | :closed | :inet.posix()
  @opaque t :: %__MODULE__{}

  @timeout 5_000
  @buffer 0x1_0000

  @doc """
  Connects and shakes hands; at most `timeout` milliseconds.

  `opts`: `timeout` (5,000), `send_timeout` (30,000: how long a peer may not read before it is given up), and those of
  `Bridge.Wire.ZMTP.new/2`. Nothing is tried twice: a peer that does not listen yet is `:enoent` or `:econnrefused`.
  """
  @spec connect(address(), ZMTP.socket_type(), keyword()) :: {:ok, t()} | {:error, reason()}
  def connect(address, type, opts \\ []) do
    deadline = now() + Keyword.get(opts, :timeout, @timeout)
    {zmtp, greeting} = ZMTP.new(type, opts)

    with {:ok, socket} <- open(address, Keyword.get(opts, :send_timeout, 30_000), left(deadline)) do
      with :ok <- :gen_tcp.send(socket, greeting),
           {:ok, zmtp, early} <- shake_hands(socket, zmtp, deadline) do
        # What came with the handshake is given out by the next stream/2; this makes sure that there is one, and before
        # whatever the socket says next.
        if early != [], do: Kernel.send(self(), {:tcp, socket, ""})
        arm(socket, [])
        {:ok, %__MODULE__{socket: socket, zmtp: zmtp, early: early}}
      else
        {:error, reason} ->
          :gen_tcp.close(socket)
          {:error, reason}
      end
    end
  end

  defp open(address, send_timeout, timeout) do
    # The socket is closed if it cannot be written to in time: half a message must not be followed by another.
    opts = [:binary, packet: :raw, active: false, buffer: @buffer, send_timeout: send_timeout, send_timeout_close: true]

    case address do
      {:ipc, path} -> :gen_tcp.connect({:local, path}, 0, opts, timeout)
      {:tcp, host, port} -> :gen_tcp.connect(host(host), port, [{:nodelay, true} | opts], timeout)
    end
  end

  defp host(host) when is_binary(host), do: String.to_charlist(host)
  defp host(host), do: host

  defp shake_hands(socket, zmtp, deadline) do
    with {:ok, bytes} <- :gen_tcp.recv(socket, 0, left(deadline)),
         {:ok, zmtp, events, output} <- ZMTP.feed(zmtp, bytes),
         :ok <- :gen_tcp.send(socket, output) do
      case events do
        [:ready | events] -> {:ok, zmtp, messages(events)}
        [] -> shake_hands(socket, zmtp, deadline)
      end
    end
  end

  @doc """
  Sends one message. It blocks while an earlier one waits for the peer to read, at most for `send_timeout`; after an
  error the connection is closed.
  """
  @spec send(t(), [iodata()]) :: :ok | {:error, reason()}
  def send(%__MODULE__{} = t, frames), do: write(t, ZMTP.message(t.zmtp, frames))

  @doc "Asks for the messages whose first frame begins with `topic`."
  @spec subscribe(t(), iodata()) :: :ok | {:error, reason()}
  def subscribe(%__MODULE__{} = t, topic), do: write(t, ZMTP.subscribe(topic))

  defp write(t, iodata) do
    with {:error, reason} <- :gen_tcp.send(t.socket, iodata) do
      :gen_tcp.close(t.socket)
      {:error, reason}
    end
  end

  @doc """
  Takes a message that the owner received: the ZeroMQ messages in it, oldest first, or why there will be no more.
  `:unknown` if it is not this connection's.
  """
  @spec stream(t(), term()) :: {:ok, t(), [[binary()]]} | {:error, t(), reason()} | :unknown
  def stream(%__MODULE__{socket: socket} = t, {:tcp, socket, bytes}) do
    case ZMTP.feed(t.zmtp, bytes) do
      {:ok, zmtp, events, output} ->
        arm(socket, output)
        {:ok, %{t | zmtp: zmtp, early: []}, t.early ++ messages(events)}

      {:error, reason} ->
        :gen_tcp.close(socket)
        {:error, t, reason}
    end
  end

  def stream(%__MODULE__{socket: socket} = t, {:tcp_closed, socket}), do: {:error, t, :closed}
  def stream(%__MODULE__{socket: socket} = t, {:tcp_error, socket, reason}), do: {:error, t, reason}
  def stream(%__MODULE__{}, _message), do: :unknown

  # What fails here must not lose the messages that have come: it is told as the next thing that happens.
  defp arm(socket, output) do
    with :ok <- if(output == [], do: :ok, else: :gen_tcp.send(socket, output)),
         :ok <- :inet.setopts(socket, active: :once) do
      :ok
    else
      {:error, _reason} -> Kernel.send(self(), {:tcp_closed, socket})
    end
  end

  @doc """
  Closes the connection; no message of it comes any more. What was sent is waited for while the peer reads, and five
  seconds if it does not.
  """
  @spec close(t()) :: :ok
  def close(%__MODULE__{socket: socket}) do
    :gen_tcp.close(socket)
    flush(socket)
  end

  defp flush(socket) do
    receive do
      {:tcp, ^socket, _bytes} -> flush(socket)
      {:tcp_closed, ^socket} -> flush(socket)
      {:tcp_error, ^socket, _reason} -> flush(socket)
    after
      0 -> :ok
    end
  end

  defp messages(events), do: for({:message, frames} <- events, do: frames)

  defp now, do: System.monotonic_time(:millisecond)
  defp left(deadline), do: max(deadline - now(), 0)
end
