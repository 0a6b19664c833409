defmodule Bridge.Kernel.Launch do
  @moduledoc false
  # One kernel's process in the operating system: its directory, connection file and log, the port that starts it, and
  # its end with everything that it started. Connecting to it, and asking it to shut down, are its owner's business.
  #
  # The process that calls `start/2` owns the kernel, and gets `{port, {:exit_status, status}}` when it has ended. The
  # port is the kernel's lifeline: its stdin ends when the owner dies or the BEAM does, SIGKILL included, and the kernel
  # then kills its own process group. A kernel that is stopped, or stuck in C code, cannot do that: for the owner's
  # death there is a guard beside, which kills from outside.

  alias Bridge.Error
  alias Bridge.Pool.Orphans

  @channels [shell: 1, iopub: 2, stdin: 3, control: 4, hb: 5]
  @last_bound :iopub
  # sockaddr_un has 108 bytes, the last one is NUL.
  @longest_path 107
  @tail_bytes 4_000
  @most_log_bytes 1_000_000
  @look_ms 10

  # The shell is replaced by the kernel at once; it is there for the log alone. What the kernel prints must not come
  # through the port: a grandchild that holds the pipe would hold back the exit status, and a flood would fill the
  # owner's mailbox. It is opened for appending, so that it can be cut meanwhile.
  @exec ~S(log=$1; shift; exec "$@" >>"$log" 2>&1)
  @kill ~S(kill -s KILL -- "-$1" 2>/dev/null)

  @derive {Inspect, only: [:number, :os_pid, :dir]}
  @enforce_keys [:number, :port, :os_pid, :connection, :dir, :started, :guard]
  defstruct @enforce_keys

  @type connection :: %{
          key: String.t(),
          file: Path.t(),
          shell: {:ipc, Path.t()},
          iopub: {:ipc, Path.t()},
          stdin: {:ipc, Path.t()},
          control: {:ipc, Path.t()},
          hb: {:ipc, Path.t()}
        }
  @type t :: %__MODULE__{
          number: non_neg_integer(),
          port: port(),
          os_pid: pos_integer(),
          connection: connection(),
          dir: Path.t(),
          started: integer() | nil,
          guard: pid() | nil
        }

  @doc "Start the `number`th kernel of that bridge. It is not connectable yet: see `await/2`."
  @spec start(Bridge.Config.t(), non_neg_integer()) :: {:ok, t()} | {:error, Error.t()}
  def start(cfg, number) do
    with {:ok, python} <- find_python(cfg.python),
         {:ok, shell} <- find_shell(),
         dir = Path.join(cfg.runtime_dir, "bridge-#{number}-#{System.unique_integer([:positive])}"),
         {:ok, connection} <- connection(dir),
         :ok <- prepare(dir, connection),
         {:ok, port, os_pid} <- open(shell, python, cfg, dir, connection) do
      launched = %__MODULE__{
        number: number,
        port: port,
        os_pid: os_pid,
        connection: connection,
        dir: dir,
        started: Orphans.started(os_pid),
        guard: nil
      }

      launched = %{launched | guard: guard(launched)}
      # Failing to write costs the sweep, and only if this host is killed: no reason to fail a kernel for it.
      _ = Orphans.record(dir, os_pid)
      {:ok, launched}
    end
  end

  @doc """
  Wait until the kernel can be connected to. An error if it ends before that, or takes longer than `timeout` ms; the
  kernel is then still to be closed. Only for the owner, whose mailbox is looked at for the kernel's end alone.
  """
  @spec await(t(), non_neg_integer()) :: :ok | {:error, Error.t()}
  def await(launched, timeout), do: await_until(launched, now() + timeout, timeout)

  defp await_until(%{port: port} = launched, until, timeout) do
    receive do
      {^port, {:exit_status, status}} ->
        # Put back for the owner: that the process has ended is news for more than this.
        send(self(), {port, {:exit_status, status}})
        {:error, exit_error(launched, status)}
    after
      0 ->
        cond do
          listening?(launched) ->
            :ok

          now() >= until ->
            {:error, failed("the kernel was not ready within #{timeout} ms", launched, remedy: give_it_more_time())}

          true ->
            await_later(launched, until, timeout)
        end
    end
  end

  defp await_later(%{port: port} = launched, until, timeout) do
    receive do
      {^port, {:exit_status, status}} ->
        send(self(), {port, {:exit_status, status}})
        {:error, exit_error(launched, status)}
    after
      @look_ms -> await_until(launched, until, timeout)
    end
  end

  # The last of its sockets: all others are bound before. That its file exists does not say that anybody listens yet.
  defp listening?(%{connection: connection}) do
    {:ipc, path} = Map.fetch!(connection, @last_bound)

    with true <- File.exists?(path),
         {:ok, socket} <- :gen_tcp.connect({:local, path}, 0, [:binary, active: false], 1_000) do
      :gen_tcp.close(socket)
      true
    else
      _ -> false
    end
  end

  @doc "The error that says how a kernel ended before it was ready, with its last words."
  @spec exit_error(t(), non_neg_integer()) :: Error.t()
  def exit_error(launched, status) do
    tail = log_tail(launched)

    if String.contains?(tail, "No module named bridge_kernel") or
         String.contains?(tail, "No module named 'bridge_kernel'") do
      failed("this Python has no bridge_kernel", launched,
        remedy:
          "Install it there: pip install #{Bridge.Doctor.package()}; or name another Python: {Bridge, python: \"/path/to/python\"}."
      )
    else
      failed("the kernel ended with #{describe_status(status)} before it was ready", launched, [])
    end
  end

  @doc "How a process ended, in words, from its exit status."
  @spec describe_status(non_neg_integer()) :: String.t()
  def describe_status(status) when status > 128, do: "signal #{status - 128}"
  def describe_status(status), do: "exit code #{status}"

  @doc "The end of what the kernel wrote to its own stdout and stderr: a crash's last words."
  @spec log_tail(t()) :: String.t()
  def log_tail(launched), do: launched |> read_tail() |> String.trim()

  @doc "Keep the log from growing for ever: of a long one only the end is left."
  @spec trim_log(t()) :: :ok | {:error, File.posix()}
  def trim_log(launched) do
    case File.stat(log_path(launched.dir)) do
      {:ok, %{size: size}} when size > @most_log_bytes -> File.write(log_path(launched.dir), read_tail(launched))
      {:ok, _} -> :ok
      {:error, reason} -> {:error, reason}
    end
  end

  @doc "Kill the kernel and everything in its process group, at once. Does nothing if that has been done."
  @spec kill(t()) :: :ok
  def kill(%__MODULE__{os_pid: os_pid, started: started}) do
    # A pid may have come to mean another process. As long as any of the group lives, it cannot: then there is none.
    case Orphans.started(os_pid) do
      ^started -> kill_group(os_pid)
      nil -> kill_group(os_pid)
      _another -> :ok
    end
  end

  @doc "Kill what is left of the kernel and remove its files. Does nothing the second time."
  @spec close(t()) :: :ok
  def close(launched) do
    kill(launched)
    close_port(launched.port)
    File.rm_rf(launched.dir)
    if launched.guard, do: send(launched.guard, :closed)
    :ok
  end

  # -- the start -----------------------------------------------------------------------

  @doc "The Python that is meant: a path or a name, or nil for the one on the PATH."
  @spec find_python(String.t() | nil) :: {:ok, Path.t()} | {:error, Error.t()}
  def find_python(python) do
    names = if python, do: [python], else: ["python3", "python"]

    case Enum.find_value(names, &System.find_executable/1) do
      nil ->
        Error.error(:kernel_start_failed, "there is no program #{Enum.map_join(names, " and no ", &inspect/1)}",
          remedy:
            "Install Python and bridge-kernel, or say where: {Bridge, python: \"/path/to/python\"}. See Bridge.doctor()."
        )

      path ->
        {:ok, path}
    end
  end

  defp find_shell do
    case System.find_executable("sh") do
      nil ->
        Error.error(:kernel_start_failed, "there is no sh on the PATH",
          remedy: "Kernels are started on Unix systems only: Linux, macOS, or WSL on Windows."
        )

      path ->
        {:ok, path}
    end
  end

  defp connection(dir) do
    base = Path.join(dir, "k")
    paths = for {channel, number} <- @channels, do: {channel, {:ipc, "#{base}-#{number}"}}
    too_long = Enum.find(paths, fn {_, {:ipc, path}} -> byte_size(path) > @longest_path end)

    if too_long do
      Error.error(:kernel_start_failed, "#{dir} is too long a path for sockets (#{@longest_path} bytes)",
        remedy: "Set TMPDIR to a shorter directory, such as /tmp, before the BEAM is started."
      )
    else
      key = Base.encode16(:crypto.strong_rand_bytes(32), case: :lower)
      {:ok, Map.new([{:key, key}, {:file, base <> ".json"} | paths])}
    end
  end

  defp prepare(dir, connection) do
    ports = for {channel, number} <- @channels, do: {"#{channel}_port", number}

    content =
      Bridge.JSON.encode!(
        Map.new(ports)
        |> Map.merge(%{
          "transport" => "ipc",
          "ip" => Path.rootname(connection.file),
          "key" => connection.key,
          "signature_scheme" => "hmac-sha256"
        })
      )

    with :ok <- File.mkdir(dir),
         :ok <- File.chmod(dir, 0o700),
         :ok <- File.write(connection.file, ""),
         :ok <- File.chmod(connection.file, 0o600),
         :ok <- File.write(connection.file, content) do
      :ok
    else
      {:error, reason} ->
        File.rm_rf(dir)

        Error.error(:kernel_start_failed, "#{dir} could not be written: #{:file.format_error(reason)}",
          remedy: "See to that directory (space, permissions), or set TMPDIR to another."
        )
    end
  end

  defp open(shell, python, cfg, dir, connection) do
    lifeline = "--BridgeKernelApp.lifeline=stdin"
    command = [python, "-m", "bridge_kernel", "-f", connection.file, lifeline | Enum.map(cfg.arguments, &to_string/1)]
    ours = %{"JPY_PARENT_PID" => System.pid(), "BRIDGE_RUNTIME_DIR" => dir}
    env = for {name, value} <- Map.merge(names_to_strings(cfg.env.()), ours), do: {to_charlist(name), env_value(value)}
    options = [:binary, :exit_status, :hide, args: ["-c", @exec, "sh", log_path(dir) | command], env: env]
    port = Port.open({:spawn_executable, shell}, options)

    case Port.info(port, :os_pid) do
      {:os_pid, os_pid} when is_integer(os_pid) ->
        {:ok, port, os_pid}

      _gone ->
        close_port(port)
        File.rm_rf(dir)
        Error.error(:kernel_start_failed, "the kernel ended as soon as it was started")
    end
  rescue
    # No more processes or descriptors, or an environment that the system does not take.
    error in [ErlangError, ArgumentError] ->
      File.rm_rf(dir)
      Error.error(:kernel_start_failed, "the kernel could not be launched: #{Exception.message(error)}")
  end

  defp names_to_strings(env), do: Map.new(env, fn {name, value} -> {to_string(name), value} end)

  defp env_value(unset) when unset in [nil, false], do: false
  defp env_value(value), do: value |> to_string() |> to_charlist()

  # -- the end ----------------------------------------------------------------------------

  defp guard(launched) do
    owner = self()

    # Neither linked nor supervised: it has to outlive its owner, however that dies, and ends right after it.
    spawn(fn ->
      monitor = Process.monitor(owner)

      receive do
        :closed -> :ok
        {:DOWN, ^monitor, :process, _, _} -> close(launched)
      end
    end)
  end

  defp kill_group(os_pid) do
    {_, _nobody_left} = System.cmd(System.find_executable("sh"), ["-c", @kill, "sh", Integer.to_string(os_pid)])
    :ok
  end

  defp close_port(port) do
    Port.close(port)
    :ok
  rescue
    # It was closed already: its process has ended.
    ArgumentError -> :ok
  end

  defp log_path(dir), do: Path.join(dir, "kernel.log")

  defp read_tail(launched) do
    path = log_path(launched.dir)

    with {:ok, %{size: size}} <- File.stat(path),
         {:ok, file} <- :file.open(path, [:read, :raw, :binary]) do
      read = :file.pread(file, max(size - @tail_bytes, 0), @tail_bytes)
      :ok = :file.close(file)

      case read do
        {:ok, text} -> text |> String.chunk(:valid) |> Enum.map_join(&if(String.valid?(&1), do: &1, else: "�"))
        _ -> ""
      end
    else
      _ -> ""
    end
  end

  defp failed(message, launched, opts) do
    tail = log_tail(launched)
    said = if tail == "", do: "It printed nothing.", else: "It printed:\n" <> tail
    Error.new(:kernel_start_failed, "#{message}. #{said}", opts)
  end

  defp give_it_more_time,
    do: "Give it more time: {Bridge, start_timeout: 120_000}. Bridge.doctor() says what is missing."

  defp now, do: System.monotonic_time(:millisecond)
end
