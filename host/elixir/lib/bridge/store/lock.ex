defmodule Bridge.Store.Lock do
  @moduledoc false
  # One host a store: the file `owner` in its directory says whose it is, by the number and the start of the operating
  # system's process, and by the Erlang processes that own and write it. A lock whose owner is no more is taken over.

  alias Bridge.Error
  alias Bridge.Store.Files

  @file_name "owner"
  @fields ~w(pid started host directory owner writer)
  @max_bytes 4096
  @wait_ms 5_000

  @enforce_keys [:path, :content, :guard]
  defstruct @enforce_keys

  @type t :: %__MODULE__{path: Path.t(), content: binary(), guard: port() | nil}

  @doc "The store in that directory belongs to the caller until `release/1`, or until it ends, however it does."
  @spec acquire(Path.t(), pid()) :: {:ok, t()} | {:error, Error.t()}
  def acquire(directory, writer) do
    path = Path.join(directory, @file_name)
    content = content(directory, writer)

    case guard(directory) do
      {:ok, guard} ->
        result = take(directory, path, content, 3)
        # Held only while the lock changes hands; then the file says it all.
        if guard, do: :gen_tcp.close(guard)
        with :ok <- result, do: {:ok, %__MODULE__{path: path, content: content, guard: nil}}

      :busy ->
        Error.error(:store_locked, "the store #{directory} is being opened by another process")
    end
  end

  @spec release(t()) :: :ok
  def release(%__MODULE__{} = lock) do
    # Only what is ours.
    with {:ok, content} when content == lock.content <- File.read(lock.path), do: File.rm(lock.path)
    :ok
  end

  # Of two that find a stale lock at once, one takes it over: a name in the kernel (Linux), which ends with its process.
  defp guard(directory) do
    with {:unix, :linux} <- :os.type(),
         {:ok, stat} <- File.stat(directory) do
      name = <<0, "bridge-store-#{stat.major_device}-#{stat.inode}">>

      case :gen_tcp.listen(0, [{:ifaddr, {:local, name}}]) do
        {:ok, socket} -> {:ok, socket}
        {:error, :eaddrinuse} -> :busy
        {:error, _not_here} -> {:ok, nil}
      end
    else
      _other -> {:ok, nil}
    end
  end

  defp take(directory, _path, _content, 0) do
    Error.error(:store_locked, "the store #{directory} is being opened by another process")
  end

  defp take(directory, path, content, tries) do
    # It is made or not, and if it is made it has its content.
    case Files.create(path, content) do
      :ok -> :ok
      {:error, :eexist} -> evict(directory, path, content, tries)
      # The draft: whoever opened the store meanwhile has cleared it away.
      {:error, :enoent} -> take(directory, path, content, tries - 1)
      {:error, reason} -> failed(directory, reason)
    end
  end

  defp evict(directory, path, content, tries) do
    case holder(path) do
      {:ok, holder} ->
        if alive?(holder, directory) do
          locked(directory, holder)
        else
          _ = File.rm(path)
          take(directory, path, content, tries - 1)
        end

      :gone ->
        take(directory, path, content, tries - 1)
    end
  end

  defp failed(directory, reason) do
    Error.error(:store_failed, "the store #{directory} cannot be locked: #{:file.format_error(reason)}")
  end

  defp locked(directory, %{"pid" => pid, "host" => host}) do
    cond do
      host != hostname() ->
        Error.error(:store_locked, "the store #{directory} is open in another process, #{pid} on #{host}",
          remedy:
            "Stop the host of process #{pid} on #{host}. If that machine is no more, delete #{directory}/#{@file_name}."
        )

      pid == System.pid() ->
        Error.error(:store_locked, "the store #{directory} is open already, in this process (#{pid})")

      true ->
        Error.error(:store_locked, "the store #{directory} is open in another process, #{pid}",
          remedy: "Stop the host of process #{pid}, or end it, or open another directory."
        )
    end
  end

  # What is in the file; one that says nothing was written by nobody who lives.
  defp holder(path) do
    with {:ok, file} <- :file.open(path, [:read, :raw, :binary]) do
      content = :file.read(file, @max_bytes)
      _ = :file.close(file)

      case content do
        {:ok, text} ->
          {:ok,
           for line <- String.split(text, "\n"),
               [field, value] <- [String.split(line, " ", parts: 2)],
               field in @fields,
               into: Map.new(@fields, &{&1, ""}) do
             {field, value}
           end}

        _nothing ->
          {:ok, Map.new(@fields, &{&1, ""})}
      end
    else
      {:error, _reason} -> :gone
    end
  end

  defp alive?(holder, directory) do
    cond do
      # A copy of a directory has a copy of its lock, which says nothing about it.
      holder["directory"] != identity(directory) -> false
      holder["host"] != hostname() -> true
      holder["started"] != started(holder["pid"]) -> false
      holder["pid"] != System.pid() -> true
      true -> alive_here?(holder)
    end
  end

  # In this process: the owner may have died, and what wrote for it be in its last write.
  defp alive_here?(%{"owner" => owner, "writer" => writer}) do
    with false <- owner |> to_pid() |> alive_pid?(), pid when pid != nil <- to_pid(writer) do
      monitor = Process.monitor(pid)

      receive do
        {:DOWN, ^monitor, :process, ^pid, _reason} -> false
      after
        @wait_ms -> Process.demonitor(monitor, [:flush]) && true
      end
    else
      alive -> alive == true
    end
  end

  defp alive_pid?(nil), do: false
  defp alive_pid?(pid), do: Process.alive?(pid)

  defp to_pid(text) do
    if text =~ ~r/\A<0\.[0-9]{1,12}\.[0-9]{1,12}>\z/, do: :erlang.list_to_pid(String.to_charlist(text))
  end

  defp content(directory, writer) do
    pid = System.pid()

    values = [
      pid,
      started(pid),
      hostname(),
      identity(directory),
      :erlang.pid_to_list(self()),
      :erlang.pid_to_list(writer)
    ]

    Enum.zip_with(@fields, values, fn field, value -> "#{field} #{value}\n" end) |> IO.iodata_to_binary()
  end

  defp identity(directory) do
    case File.stat(directory) do
      {:ok, stat} -> "#{stat.major_device}:#{stat.inode}"
      {:error, _reason} -> "?"
    end
  end

  defp hostname do
    {:ok, name} = :inet.gethostname()
    List.to_string(name)
  end

  # When a process began, as its system says it; "" if there is none. Numbers of processes are used again.
  defp started(pid) do
    with true <- pid =~ ~r/\A[0-9]{1,10}\z/,
         {:error, _reason} <- File.read("/proc/#{pid}/stat"),
         false <- File.dir?("/proc/self"),
         {text, 0} <- System.cmd("ps", ["-o", "lstart=", "-p", pid], stderr_to_stdout: true) do
      String.trim(text)
    else
      {:ok, stat} -> stat |> String.split(")") |> List.last() |> String.split() |> Enum.at(19, "")
      _none -> ""
    end
  end
end
