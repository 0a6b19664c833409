defmodule Bridge.Store.Log do
  @moduledoc false
  # The form of a store's files: a header, then frames, each one batch of facts that is there whole or not at all.
  #
  #     header  "BRIDGE STORE" version::16 kind::8 generation::64 crc32::32
  #     frame   "BrgF" size::64 crc32::32 synced::64 payload (size bytes, an Erlang term)
  #
  # A write that was cut short leaves a bad frame at the end. So does damage; to tell them apart each frame says up to
  # where the file was on disk for certain when it was written (`synced`). What is bad before that, was good once.

  alias Bridge.Store.Atoms

  @magic "BRIDGE STORE"
  @version 1
  @header_bytes byte_size(@magic) + 2 + 1 + 8 + 4
  @frame_magic "BrgF"
  @frame_bytes 4 + 8 + 4 + 8
  @read_ahead 1024 * 1024

  @type kind :: :log | :snapshot

  @spec header_bytes() :: pos_integer()
  def header_bytes, do: @header_bytes

  @spec header(kind(), pos_integer()) :: binary()
  def header(kind, generation) do
    content = <<@magic, @version::16, kind(kind)::8, generation::64>>
    <<content::binary, :erlang.crc32(content)::32>>
  end

  defp kind(:log), do: 1
  defp kind(:snapshot), do: 2

  @doc "One frame. `synced`: that many bytes of the file are on disk."
  @spec frame(term(), non_neg_integer()) :: iodata()
  def frame(term, synced) do
    payload = :erlang.term_to_iovec(term)
    size = :erlang.iolist_size(payload)
    [<<@frame_magic, size::64, crc(size, synced, payload)::32, synced::64>> | payload]
  end

  defp crc(size, synced, payload), do: :erlang.crc32(:erlang.crc32(<<size::64, synced::64>>), payload)

  @doc """
  Folds over every frame's term, in order; and where the sound part ends: `:whole`, or `{:torn, bytes}`, after which there
  is but what a cut write may leave. What was whole once and is not any more is an error that says where; so is a term that
  `fun` refuses. The terms make no more atoms than `budget` has left.
  """
  @spec fold(Path.t(), kind(), pos_integer(), Atoms.budget(), acc, (term(), acc -> {:ok, acc} | {:error, String.t()})) ::
          {:ok, acc, :whole | {:torn, non_neg_integer()}} | {:error, String.t()}
        when acc: term()
  def fold(path, kind, generation, budget, acc, fun) do
    with {:ok, file} <- open(path) do
      size = size(file)

      result =
        case :file.read(file, @header_bytes) do
          {:ok, header} ->
            with :ok <- check_header(header, kind, generation) do
              step = fn payload, acc -> step(payload, budget, acc, fun) end
              frames(file, @header_bytes, size, acc, step)
            end

          :eof ->
            {:error, "it is empty"}

          {:error, reason} ->
            {:error, "it cannot be read: #{:file.format_error(reason)}"}
        end

      _ = :file.close(file)
      result
    end
  end

  defp step(payload, budget, acc, fun) do
    case Atoms.decode(payload, budget) do
      {:ok, term} -> fun.(term, acc)
      :error -> {:error, "it is no term"}
    end
  end

  defp open(path) do
    with {:error, reason} <- :file.open(path, [:read, :raw, :binary, {:read_ahead, @read_ahead}]) do
      {:error, "it cannot be read: #{:file.format_error(reason)}"}
    end
  end

  defp size(file) do
    {:ok, size} = :file.position(file, :eof)
    {:ok, 0} = :file.position(file, :bof)
    size
  end

  defp check_header(<<@magic, version::16, kind::8, generation::64, crc::32>> = header, wanted, number) do
    content = binary_part(header, 0, @header_bytes - 4)

    cond do
      :erlang.crc32(content) != crc -> {:error, "its header is damaged"}
      version != @version -> {:error, "its format has version #{version}, this Bridge reads version #{@version}"}
      kind != kind(wanted) or generation != number -> {:error, "it was renamed: it is another file of a store"}
      true -> :ok
    end
  end

  defp check_header(_header, _kind, _generation), do: {:error, "it is no file of a store"}

  defp frames(_file, at, size, acc, _step) when at == size, do: {:ok, acc, :whole}

  defp frames(file, at, size, acc, step) do
    case read_frame(file, size - at) do
      {:ok, payload} ->
        case step.(payload, acc) do
          {:ok, acc} -> frames(file, at + @frame_bytes + byte_size(payload), size, acc, step)
          {:error, reason} -> {:error, "what is at byte #{at} was not written by Bridge: #{reason}"}
        end

      :bad ->
        if sound_later?(file, at, size) do
          {:error, "it is damaged at byte #{at}"}
        else
          {:ok, acc, {:torn, at}}
        end
    end
  end

  defp read_frame(file, left) do
    with true <- left >= @frame_bytes,
         {:ok, <<@frame_magic, size::64, crc::32, synced::64>>} <- :file.read(file, @frame_bytes),
         true <- left - @frame_bytes >= size,
         {:ok, payload} when byte_size(payload) == size <- :file.read(file, size),
         true <- crc(size, synced, payload) == crc do
      {:ok, payload}
    else
      _no_frame -> :bad
    end
  end

  # Whether a frame after `bad` knew that what is at `bad` was on disk.
  defp sound_later?(file, bad, size) do
    {:ok, ^bad} = :file.position(file, bad)

    case :file.read(file, size - bad) do
      {:ok, rest} ->
        rest
        |> :binary.matches(@frame_magic)
        |> Enum.any?(fn {at, _length} -> at > 0 and knows?(binary_part(rest, at, byte_size(rest) - at), bad) end)

      _nothing ->
        false
    end
  end

  defp knows?(<<@frame_magic, size::64, crc::32, synced::64, rest::binary>>, bad)
       when synced > bad and size <= byte_size(rest) do
    crc(size, synced, binary_part(rest, 0, size)) == crc
  end

  defp knows?(_rest, _bad), do: false
end
