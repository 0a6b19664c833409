defmodule Bridge.Pool.Orphans do
  @moduledoc false
  # Kernels that outlived their host: what a host writes down of its processes, and the sweep that the next host does.
  #
  # A kernel ends by itself when its host has died, but not while it is stopped (SIGSTOP, a debugger) or stuck in C code.
  # So each host records its processes in its runtime directory, and each host that starts looks for records whose host
  # is gone. The record is the Python host's too: each sweeps up after the other. On Linux alone, where `/proc` says when
  # a process started: a pid by itself says nothing, for pids are reused.

  @record "owner.json"
  @process "process"
  @prefix "bridge-"
  @most_bytes 1_048_576
  @kill ~S(kill -s KILL -- "-$1" 2>/dev/null)

  @type swept :: %{directory: Path.t(), host: integer(), killed: [integer()]}

  @doc "When the process started, in clock ticks since boot; nil if there is none, or only what is left of one."
  @spec started(integer()) :: integer() | nil
  def started(pid) do
    case process(pid) do
      %{started: started} -> started
      nil -> nil
    end
  end

  defp process(pid) do
    with {:ok, line} <- File.read("/proc/#{pid}/stat"),
         # The name of the program, in parentheses, may hold anything.
         [state | fields] = line |> String.split(")") |> List.last() |> String.split(),
         true <- state not in ["Z", "X"] do
      %{group: fields |> Enum.at(1) |> String.to_integer(), started: fields |> Enum.at(18) |> String.to_integer()}
    else
      _ -> nil
    end
  end

  @doc "Write down that the kernel with this directory, in the runtime directory of this host, is that process."
  @spec record(Path.t(), integer()) :: :ok | {:error, File.posix()}
  def record(kernel_dir, pid) do
    with started when started != nil <- started(pid),
         :ok <- File.write(Path.join(kernel_dir, @process), "#{pid} #{started}") do
      write(Path.dirname(kernel_dir))
    else
      nil -> :ok
      error -> error
    end
  end

  # Kernels are started at the same time by several processes: who finds that another has come meanwhile writes again.
  defp write(runtime_dir) do
    kernels = recorded(runtime_dir)
    own = own_pid()
    record = %{"where" => where(), "pid" => own, "started" => started(own) || 0, "kernels" => kernels}
    path = Path.join(runtime_dir, ".#{@record}-#{System.unique_integer([:positive])}")

    with :ok <- File.write(path, ""),
         :ok <- File.chmod(path, 0o600),
         :ok <- File.write(path, Bridge.JSON.encode!(record)),
         :ok <- File.rename(path, Path.join(runtime_dir, @record)) do
      if recorded(runtime_dir) == kernels, do: :ok, else: write(runtime_dir)
    end
  end

  defp recorded(runtime_dir) do
    for kernel_dir <- directories(runtime_dir),
        {:ok, text} <- [File.read(Path.join(kernel_dir, @process))],
        [pid, started] <- [String.split(text)],
        into: %{},
        do: {pid, String.to_integer(started)}
  end

  @doc """
  End what is left of this user's dead hosts, and remove their runtime directories. `parent` is where these are made.

  A directory without a readable record, of another user, of another machine or of a living host is left alone.
  """
  @spec sweep(Path.t()) :: [swept()]
  def sweep(parent \\ System.tmp_dir!()) do
    if started(own_pid()) == nil do
      []
    else
      place = where()

      for directory <- directories(parent),
          {:ok, %{where: ^place} = owner} <- [read(directory)],
          started(owner.pid) != owner.started do
        killed = for {pid, started} <- owner.kernels, kill(pid, started), do: pid
        File.rm_rf(directory)
        %{directory: directory, host: owner.pid, killed: killed}
      end
    end
  end

  defp directories(parent) do
    case File.ls(parent) do
      {:ok, names} -> for name <- Enum.sort(names), String.starts_with?(name, @prefix), do: Path.join(parent, name)
      {:error, _} -> []
    end
  end

  defp read(directory) do
    path = Path.join(directory, @record)

    with {:ok, %{type: :directory, uid: uid, mode: mode}} <- File.lstat(directory),
         true <- uid == own_uid() and Bitwise.band(mode, 0o777) == 0o700,
         # Not a link, nor a pipe that nobody writes to. Nobody else can change it: the directory is this user's own.
         {:ok, %{type: :regular, uid: ^uid, size: size}} when size <= @most_bytes <- File.lstat(path),
         {:ok, text} <- File.read(path),
         {:ok, %{"where" => where, "pid" => pid, "started" => started} = record} <- Bridge.JSON.decode(text),
         true <- is_binary(where) and is_integer(pid) and is_number(started),
         {:ok, kernels} <- kernels(Map.get(record, "kernels", %{})) do
      {:ok, %{where: where, pid: pid, started: trunc(started), kernels: kernels}}
    else
      _ -> :error
    end
  end

  defp kernels(%{} = kernels) do
    Enum.reduce_while(kernels, {:ok, []}, fn {pid, started}, {:ok, all} ->
      case is_number(started) and Integer.parse(pid) do
        {pid, ""} -> {:cont, {:ok, [{pid, trunc(started)} | all]}}
        _ -> {:halt, :error}
      end
    end)
  end

  defp kernels(_other), do: :error

  # The group that the process leads, if it is that very process. Stopped processes too.
  defp kill(pid, started) do
    with true <- pid > 1 and pid != own_pid(),
         %{group: ^pid, started: ^started} <- process(pid),
         {_, 0} <- System.cmd("sh", ["-c", @kill, "sh", Integer.to_string(pid)]) do
      true
    else
      _ -> false
    end
  end

  # The boot and the pid namespace in which this process's pids mean something: a directory may be seen from elsewhere (a
  # container that shares /tmp), where its live host looks dead.
  defp where do
    with {:ok, boot} <- File.read("/proc/sys/kernel/random/boot_id"),
         {:ok, namespace} <- File.read_link("/proc/self/ns/pid") do
      "#{String.trim(boot)} #{namespace}"
    else
      _ -> ""
    end
  end

  defp own_pid, do: String.to_integer(System.pid())

  defp own_uid do
    case File.stat("/proc/self") do
      {:ok, %{uid: uid}} -> uid
      {:error, _} -> nil
    end
  end
end
