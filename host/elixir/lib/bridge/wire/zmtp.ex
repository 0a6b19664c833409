defmodule Bridge.Wire.ZMTP do
  @moduledoc false
  # The client's side of ZMTP 3.1 (https://rfc.zeromq.org/spec/37/), security mechanism NULL: bytes to events, messages
  # to bytes. Pure; the caller owns the socket.
  #
  # `feed/2` takes bytes cut anywhere. Everything is bounded: what the peer announces is refused before a byte of it is
  # kept, and what is kept costs no more than a constant times its size, however small the pieces are.

  @greeting <<0xFF, 0::64, 0x7F, 3, 1, "NULL", 0::128, 0, 0::248>>
  @greeting_bytes 64
  @max_message_bytes 0x1000_0000
  @max_frames 4096
  @max_command_bytes 65_536
  @piece 4096

  # Who may be at the other end.
  @partners %{
    dealer: ["ROUTER", "DEALER", "REP"],
    sub: ["XPUB", "PUB"],
    req: ["REP", "ROUTER"]
  }

  @derive {Inspect, only: [:type, :phase, :count, :bytes]}
  @enforce_keys [:type, :max_bytes, :max_frames]
  defstruct [
    :type,
    :max_bytes,
    :max_frames,
    # :greeting, :handshake or :traffic
    phase: :greeting,
    # Less than a greeting, or than a frame's head.
    rest: "",
    # {flags, bytes missing, pieces newest first}: the frame of which a part is here.
    frame: nil,
    # The message of which frames are here: newest first, how many, how many bytes.
    frames: [],
    count: 0,
    bytes: 0
  ]

  @type socket_type :: :dealer | :sub | :req
  @type event :: :ready | {:message, [binary()]}
  @type reason ::
          :not_zmtp
          | :unsupported_version
          | :unsupported_mechanism
          | :incompatible_peer
          | :malformed_frame
          | :malformed_command
          | :unexpected_message
          | :missing_delimiter
          | :message_too_large
          | :too_many_frames
          | :command_too_large
          | {:refused, String.t()}
  @opaque t :: %__MODULE__{}

  @doc """
  A connection that has just been made, and what to send first.

  `opts`: `max_message_bytes` (256 MiB) and `max_frames` (4,096) of one message received, `identity` (none).
  """
  @spec new(socket_type(), keyword()) :: {t(), iodata()}
  def new(type, opts \\ []) when is_map_key(@partners, type) do
    t = %__MODULE__{
      type: type,
      max_bytes: Keyword.get(opts, :max_message_bytes, @max_message_bytes),
      max_frames: Keyword.get(opts, :max_frames, @max_frames)
    }

    # The handshake of NULL is symmetric: nothing of it depends on what the peer says.
    {t, [@greeting, ready(type, Keyword.get(opts, :identity, ""))]}
  end

  @doc "What the bytes that came mean, and what to send in return. After an error the connection is of no more use."
  @spec feed(t(), binary()) :: {:ok, t(), [event()], iodata()} | {:error, reason()}
  def feed(%__MODULE__{} = t, bytes) when is_binary(bytes), do: run(t, bytes, [], [])

  @doc "A message as it is sent."
  @spec message([iodata()]) :: iodata()
  def message([_ | _] = frames), do: Enum.reverse(frames) |> message_tail([])

  @doc "A message as a socket of this type sends it: that of a REQ begins with an empty frame."
  @spec message(t(), [iodata()]) :: iodata()
  def message(%__MODULE__{type: :req}, frames), do: message(["" | frames])
  def message(%__MODULE__{}, frames), do: message(frames)

  @doc """
  A subscription to the topics that begin with `topic`, as it is sent.

  As a message, which peers of 3.0 and of 3.1 understand; the command SUBSCRIBE is 3.1's own.
  """
  @spec subscribe(iodata()) :: iodata()
  def subscribe(topic), do: message([[1, topic]])

  defp message_tail([last | rest], []), do: message_tail(rest, [head(0, last), last], :more)
  defp message_tail([], sent, :more), do: sent
  defp message_tail([frame | rest], sent, :more), do: message_tail(rest, [head(1, frame), frame | sent], :more)

  defp head(flags, body) do
    case IO.iodata_length(body) do
      size when size < 256 -> <<flags, size>>
      size -> <<flags + 2, size::64>>
    end
  end

  defp command(name, data) do
    body = [byte_size(name), name, data]
    [head(4, body), body]
  end

  defp ready(type, identity) do
    socket_type = property("Socket-Type", type |> Atom.to_string() |> String.upcase())
    command("READY", if(type == :sub, do: socket_type, else: [socket_type, property("Identity", identity)]))
  end

  defp property(name, value), do: [byte_size(name), name, <<byte_size(value)::32>>, value]

  # A part of a frame is here, and this is more of it.
  defp run(%{frame: {flags, missing, pieces}} = t, bytes, events, output) do
    case bytes do
      <<piece::binary-size(missing), rest::binary>> ->
        body = [piece | pieces] |> Enum.reverse() |> IO.iodata_to_binary()
        take(%{t | frame: nil}, flags, body, rest, events, output)

      _ ->
        stop(%{t | frame: {flags, missing - byte_size(bytes), add(bytes, pieces)}}, events, output)
    end
  end

  # `rest` is a few bytes, so this copies no more than what has just come.
  defp run(%{rest: rest} = t, bytes, events, output) when rest != "",
    do: run(%{t | rest: ""}, rest <> bytes, events, output)

  defp run(%{phase: :greeting} = t, bytes, events, output) do
    case bytes do
      <<greeting::binary-size(@greeting_bytes), rest::binary>> ->
        with :ok <- greeted(greeting), do: run(%{t | phase: :handshake}, rest, events, output)

      _ ->
        # Who is no peer is not waited for.
        with :ok <- greeted(bytes), do: stop(%{t | rest: bytes}, events, output)
    end
  end

  defp run(t, <<flags, size::64, rest::binary>>, events, output) when flags in [2, 3, 6],
    do: open(t, flags, size, rest, events, output)

  defp run(t, <<flags, size, rest::binary>>, events, output) when flags in [0, 1, 4],
    do: open(t, flags, size, rest, events, output)

  defp run(_t, <<flags, _rest::binary>>, _events, _output) when flags not in [0, 1, 2, 3, 4, 6],
    do: {:error, :malformed_frame}

  defp run(t, bytes, events, output), do: stop(%{t | rest: bytes}, events, output)

  defp stop(t, events, output), do: {:ok, t, Enum.reverse(events), Enum.reverse(output)}

  # Many small pieces are joined, or a list of them would be worth many times their bytes.
  defp add("", pieces), do: pieces
  defp add(piece, [last | pieces]) when byte_size(piece) + byte_size(last) <= @piece, do: [last <> piece | pieces]
  defp add(piece, pieces), do: [piece | pieces]

  defp greeted(<<0xFF, _::64, 0x7F, major, _::binary>>) when major < 3, do: {:error, :unsupported_version}

  defp greeted(<<0xFF, _::64, 0x7F, _major, _minor, mechanism::binary-size(20), _::binary>>)
       when mechanism != <<"NULL", 0::128>>,
       do: {:error, :unsupported_mechanism}

  defp greeted(<<0xFF, _::64, signature, _::binary>>) when signature != 0x7F, do: {:error, :not_zmtp}
  defp greeted(<<first, _::binary>>) when first != 0xFF, do: {:error, :not_zmtp}
  defp greeted(_part), do: :ok

  # A frame was announced. What is too large is refused now, before any of it is kept.
  defp open(_t, flags, size, _rest, _events, _output) when flags in [4, 6] and size > @max_command_bytes,
    do: {:error, :command_too_large}

  defp open(%{phase: :handshake}, flags, _size, _rest, _events, _output) when flags not in [4, 6],
    do: {:error, :unexpected_message}

  defp open(%{bytes: bytes, max_bytes: max}, flags, size, _rest, _events, _output)
       when flags not in [4, 6] and bytes + size > max,
       do: {:error, :message_too_large}

  defp open(%{count: max, max_frames: max}, flags, _size, _rest, _events, _output) when flags not in [4, 6],
    do: {:error, :too_many_frames}

  defp open(t, flags, size, rest, events, output) do
    case rest do
      <<body::binary-size(size), rest::binary>> -> take(t, flags, body, rest, events, output)
      _ -> stop(%{t | frame: {flags, size - byte_size(rest), add(rest, [])}}, events, output)
    end
  end

  # A frame is here.
  defp take(t, flags, body, rest, events, output) when flags in [4, 6] do
    case obey(t, body) do
      {:ok, t, event} -> run(t, rest, event ++ events, output)
      {:send, iodata} -> run(t, rest, events, [iodata | output])
      {:error, reason} -> {:error, reason}
    end
  end

  defp take(t, flags, body, rest, events, output) when flags in [1, 3] do
    t = %{t | frames: [body | t.frames], count: t.count + 1, bytes: t.bytes + byte_size(body)}
    run(t, rest, events, output)
  end

  defp take(%{type: type} = t, _last, body, rest, events, output) do
    with {:ok, frames} <- unwrap(type, Enum.reverse(t.frames, [body])) do
      run(%{t | frames: [], count: 0, bytes: 0}, rest, [{:message, frames} | events], output)
    end
  end

  defp unwrap(:req, ["" | frames]), do: {:ok, frames}
  defp unwrap(:req, _frames), do: {:error, :missing_delimiter}
  defp unwrap(_type, frames), do: {:ok, frames}

  defp obey(%{phase: :handshake} = t, <<5, "READY", properties::binary>>) do
    case socket_type(properties, nil) do
      {:ok, theirs} ->
        if theirs in Map.fetch!(@partners, t.type),
          do: {:ok, %{t | phase: :traffic}, [:ready]},
          else: {:error, :incompatible_peer}

      :error ->
        {:error, :malformed_command}
    end
  end

  defp obey(_t, <<5, "ERROR", size, why::binary-size(size)>>),
    do: {:error, {:refused, inspect(why, binaries: :as_strings)}}

  defp obey(%{phase: :handshake}, _command), do: {:error, :malformed_command}

  # Two bytes say how long the peer waits: ours to keep, and we answer at once.
  defp obey(_t, <<4, "PING", _ttl::16, context::binary>>) when byte_size(context) <= 16,
    do: {:send, command("PONG", context)}

  defp obey(_t, <<4, "PING", _::binary>>), do: {:error, :malformed_command}
  defp obey(_t, <<5, "READY", _::binary>>), do: {:error, :malformed_command}

  # A later version's command means nothing to us, as long as it is one.
  defp obey(t, <<size, _name::binary-size(size), _::binary>>) when size > 0, do: {:ok, t, []}
  defp obey(_t, _other), do: {:error, :malformed_command}

  # Names of properties are the same in any case.
  defp socket_type(<<size, name::binary-size(size), length::32, value::binary-size(length), rest::binary>>, found)
       when size > 0 do
    if String.downcase(name, :ascii) == "socket-type",
      do: socket_type(rest, value),
      else: socket_type(rest, found)
  end

  defp socket_type(<<>>, found) when found != nil, do: {:ok, found}
  defp socket_type(_other, _found), do: :error
end
