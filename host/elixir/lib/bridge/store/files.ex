defmodule Bridge.Store.Files do
  @moduledoc false
  # What files need to be there for good: synced, and so are their directories; written whole or not at all; and never
  # readable by others, whatever the umask.

  @doc "What was made, renamed or removed in that directory is on disk."
  @spec sync_directory(Path.t()) :: :ok | {:error, :file.posix()}
  def sync_directory(directory) do
    case :file.open(directory, [:read, :raw, :directory]) do
      {:ok, handle} ->
        result = :file.sync(handle)
        _ = :file.close(handle)
        # Some file systems sync no directories: theirs are on disk, or nothing can be done.
        if result in [{:error, :einval}, {:error, :enotsup}, {:error, :ebadf}], do: :ok, else: result

      {:error, :eisdir} ->
        :ok

      {:error, reason} ->
        {:error, reason}
    end
  end

  @doc "Puts a file there whole or not at all, mode 0600; what was there before stays until all of it is on disk."
  @spec write(Path.t(), iodata()) :: :ok | {:error, :file.posix()}
  def write(path, content), do: stream(path, [content])

  @doc "The same, of pieces that are not all made at once."
  @spec stream(Path.t(), Enumerable.t()) :: :ok | {:error, :file.posix()}
  def stream(path, pieces), do: drafted(path, pieces, &:file.rename(&1, path))

  @doc "The same, if there is no file of that name: `:eexist` if there is."
  @spec create(Path.t(), iodata()) :: :ok | {:error, :file.posix()}
  def create(path, content), do: drafted(path, [content], &:file.make_link(&1, path))

  # A file cannot be made with a mode, and who opens it before it has its own may read it ever after. So it is made in a
  # directory that nobody else may enter.
  defp drafted(path, pieces, place) do
    name = ".#{Path.basename(path)}.#{Base.encode16(:crypto.strong_rand_bytes(8), case: :lower)}"
    directory = Path.join(Path.dirname(path), name)
    draft = Path.join(directory, "draft")

    with :ok <- :file.make_dir(directory) do
      result =
        with :ok <- :file.change_mode(directory, 0o700),
             :ok <- written(draft, pieces),
             :ok <- place.(draft),
             do: sync_directory(Path.dirname(path))

      _ = :file.delete(draft)
      _ = :file.del_dir(directory)
      result
    end
  end

  defp written(draft, pieces) do
    with {:ok, file} <- :file.open(draft, [:write, :raw, :binary, :exclusive]) do
      result = with :ok <- :file.change_mode(draft, 0o600), :ok <- write_pieces(file, pieces), do: :file.sync(file)
      closed = :file.close(file)
      with :ok <- result, do: closed
    end
  end

  defp write_pieces(file, pieces) do
    Enum.reduce_while(pieces, :ok, fn piece, :ok ->
      case :file.write(file, piece) do
        :ok -> {:cont, :ok}
        {:error, reason} -> {:halt, {:error, reason}}
      end
    end)
  end
end
