defmodule Bridge.Wire.Frames do
  @moduledoc false
  # Signed Jupyter frames: bytes to a message and back, replays refused. Pure; the caller owns sockets, counts and logs.
  # The counterpart of kernel/bridge_kernel/contract/frames.py.

  alias Bridge.JSON

  defmodule Message do
    @moduledoc false
    # One Jupyter message whose signature was verified, its JSON decoded.

    @derive {Inspect, only: [:header]}
    @enforce_keys [:identities, :header, :parent, :metadata, :content, :buffers]
    defstruct @enforce_keys

    @type t :: %__MODULE__{
            identities: [binary()],
            header: %{String.t() => JSON.t()},
            parent: map(),
            metadata: map(),
            content: map(),
            buffers: [binary()]
          }
  end

  @delimiter "<IDS|MSG>"
  @jupyter_version "5.4"
  @max_message_bytes 0x1000_0000
  @max_identities 8
  @max_frames 4096
  @remembered 65_536

  @typedoc "The signatures received lately."
  @opaque seen :: {limit :: pos_integer(), new :: %{binary() => []}, old :: %{binary() => []}}

  @typedoc "Why frames are no message that we take. Never told to the peer, who may be anyone: it is counted."
  @type reason ::
          :too_many_frames
          | :too_large
          | :no_delimiter
          | :too_few_frames
          | :bad_signature
          | :replayed
          | :malformed_header
          | :malformed_parent
          | :malformed_metadata
          | :malformed_content

  @doc "The largest message that either side takes unless told otherwise, buffers included."
  @spec max_message_bytes() :: pos_integer()
  def max_message_bytes, do: @max_message_bytes

  @doc "The most frames that a message has."
  @spec max_frames() :: pos_integer()
  def max_frames, do: @max_frames

  @doc """
  The frames of one message, signed; content and buffers are passed on, not copied.

  `msg_id`, `msg_type` and `session` are ours: plain ASCII, no quotes. `opts`: `date` (ISO 8601; now), `parent` (the
  header it belongs to, as JSON; `{}`), `identities`.
  """
  @spec pack(binary(), String.t(), String.t(), String.t(), iodata(), [iodata()], keyword()) :: [iodata()]
  def pack(key, msg_id, msg_type, session, content, buffers \\ [], opts \\ []) do
    date = opts[:date] || DateTime.to_iso8601(DateTime.utc_now())
    parent = opts[:parent] || "{}"

    header =
      ~s({"msg_id":"#{msg_id}","msg_type":"#{msg_type}","date":"#{date}",) <>
        ~s("username":"bridge","session":"#{session}","version":"#{@jupyter_version}"})

    signature = Base.encode16(mac(key, header, parent, "{}", content), case: :lower)
    message = [@delimiter, signature, header, parent, "{}", content | buffers]
    if identities = opts[:identities], do: identities ++ message, else: message
  end

  @doc "The content of a `comm_msg`; `data` is JSON."
  @spec comm_message(String.t(), iodata()) :: iodata()
  def comm_message(comm_id, data), do: [~s({"comm_id":"), comm_id, ~s(","data":), data, ?}]

  @doc "The content of a `comm_open`; `data` is JSON."
  @spec comm_open(String.t(), String.t(), iodata()) :: iodata()
  def comm_open(comm_id, target, data),
    do: [~s({"comm_id":"), comm_id, ~s(","target_name":"), target, ~s(","data":), data, ?}]

  @doc "The content of a `comm_close`."
  @spec comm_close(String.t()) :: iodata()
  def comm_close(comm_id), do: comm_message(comm_id, "{}")

  @doc "No signature received yet; the last `limit` of them will be remembered."
  @spec seen_new(pos_integer()) :: seen()
  def seen_new(limit \\ @remembered), do: {limit, %{}, %{}}

  @doc """
  Bounds, verifies, refuses a replay, and only then parses.

  Buffers are not signed. They and the identities are copies if what they are part of is much larger, so that one that
  is kept keeps nothing else alive. `opts`: `max_bytes`, of one message, buffers included.
  """
  @spec unpack([binary()], binary(), seen(), keyword()) :: {:ok, Message.t(), seen()} | {:error, reason(), seen()}
  def unpack(frames, key, seen, opts \\ []) do
    with :ok <- bounded(frames, opts[:max_bytes] || @max_message_bytes),
         {:ok, identities, rest} <- split(frames, [], @max_identities),
         {:ok, signature, [header, parent, metadata, content] = signed, buffers} <- parts(rest),
         {:ok, mac} <- verify(signature, key, signed),
         {:ok, seen} <- remember(seen, mac) do
      with {:ok, header} <- header(header),
           {:ok, parent} <- object(parent, :malformed_parent),
           {:ok, metadata} <- object(metadata, :malformed_metadata),
           {:ok, content} <- object(content, :malformed_content) do
        message = %Message{
          identities: Enum.map(identities, &own/1),
          header: header,
          parent: parent,
          metadata: metadata,
          content: content,
          buffers: Enum.map(buffers, &own/1)
        }

        {:ok, message, seen}
      else
        {:error, reason} -> {:error, reason, seen}
      end
    else
      {:error, reason} -> {:error, reason, seen}
    end
  end

  defp bounded(frames, max_bytes), do: bounded(frames, @max_frames, max_bytes)

  defp bounded(_frames, _frames_left, bytes_left) when bytes_left < 0, do: {:error, :too_large}
  defp bounded([], _frames_left, _bytes_left), do: :ok
  defp bounded(_frames, 0, _bytes_left), do: {:error, :too_many_frames}
  defp bounded([frame | rest], frames, bytes), do: bounded(rest, frames - 1, bytes - byte_size(frame))

  defp split([@delimiter | rest], identities, _left), do: {:ok, Enum.reverse(identities), rest}
  defp split([identity | rest], identities, left) when left > 0, do: split(rest, [identity | identities], left - 1)
  defp split(_frames, _identities, _left), do: {:error, :no_delimiter}

  defp parts([signature, header, parent, metadata, content | buffers]),
    do: {:ok, signature, [header, parent, metadata, content], buffers}

  defp parts(_frames), do: {:error, :too_few_frames}

  defp verify(signature, key, [header, parent, metadata, content]) do
    mac = mac(key, header, parent, metadata, content)
    expected = Base.encode16(mac, case: :lower)

    if byte_size(signature) == byte_size(expected) and :crypto.hash_equals(signature, expected),
      do: {:ok, mac},
      else: {:error, :bad_signature}
  end

  defp mac(key, header, parent, metadata, content),
    do: :crypto.mac(:hmac, :sha256, key, [header, parent, metadata, content])

  # Two halves of a ring: when the new one is full it becomes the old one, which is dropped whole. At least `limit` are
  # remembered, at most twice as many, and none has to be looked for to be forgotten.
  defp remember({_limit, new, old}, mac) when is_map_key(new, mac) or is_map_key(old, mac), do: {:error, :replayed}
  defp remember({limit, new, _old}, mac) when map_size(new) == limit, do: {:ok, {limit, %{mac => []}, new}}
  defp remember({limit, new, old}, mac), do: {:ok, {limit, Map.put(new, mac, []), old}}

  defp header(json) do
    case JSON.decode(json) do
      {:ok, %{"msg_id" => msg_id, "msg_type" => msg_type} = header} when is_binary(msg_id) and is_binary(msg_type) ->
        if Enum.all?(["session", "username", "date", "version"], &is_binary(Map.get(header, &1, ""))),
          do: {:ok, header},
          else: {:error, :malformed_header}

      _other ->
        {:error, :malformed_header}
    end
  end

  defp object(json, reason) do
    case JSON.decode(json) do
      {:ok, %{} = object} -> {:ok, object}
      _other -> {:error, reason}
    end
  end

  defp own(binary) do
    if :binary.referenced_byte_size(binary) > 2 * byte_size(binary), do: :binary.copy(binary), else: binary
  end
end
