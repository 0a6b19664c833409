defmodule Bridge.Store.Files do
  @moduledoc false
  # What files need to be there for good: synced, and so are their directories; written whole or not at all.

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
  def stream(path, pieces) do
    name = ".#{Path.basename(path)}.#{Base.encode16(:crypto.strong_rand_bytes(8), case: :lower)}"
    draft = Path.join(Path.dirname(path), name)

    with {:ok, file} <- :file.open(draft, [:write, :raw, :binary, :exclusive]) do
      result = with :ok <- File.chmod(draft, 0o600), :ok <- write_pieces(file, pieces), do: :file.sync(file)
      closed = :file.close(file)

      with :ok <- result, :ok <- closed, :ok <- :file.rename(draft, path), :ok <- sync_directory(Path.dirname(path)) do
        :ok
      else
        {:error, reason} ->
          _ = :file.delete(draft)
          {:error, reason}
      end
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
