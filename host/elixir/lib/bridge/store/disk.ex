defmodule Bridge.Store.Disk do
  @moduledoc false
  # A store's directory: read when it is opened, and the process that writes it. What waits is written together and
  # synced once; then all who waited are answered.
  #
  #     owner  secrets.key  snapshot.<n>  log.<n>  log.<n + 1> …
  #
  # A snapshot has all that was before the log of its number. When the log has grown, the next is begun, and another
  # process makes of what was before it the next snapshot; the writer goes on meanwhile.

  use GenServer

  require Logger

  alias Bridge.Error
  alias Bridge.Store.{Files, Lock, Log, Snapshot, Tables}

  @compact_bytes 64 * 1024 * 1024
  @flush_bytes 16 * 1024 * 1024
  @max_behind 10_000
  @behind 1
  @failed 2

  @enforce_keys [:pid, :status]
  defstruct @enforce_keys

  @opaque t :: %__MODULE__{}

  # -- for the owner ---------------------------------------------------------------------------------------------------

  @doc "Opens the directory for the calling process, and makes the image what it holds."
  @spec open(Path.t() | nil, Tables.t(), keyword()) :: {:ok, t() | nil} | {:error, Error.t()}
  def open(directory, tables, opts \\ [])
  def open(nil, _tables, _opts), do: {:ok, nil}

  def open(directory, tables, opts) do
    directory = Path.expand(directory)
    status = :atomics.new(2, signed: true)

    with :ok <- make_directory(directory),
         {:ok, pid} <- GenServer.start_link(__MODULE__, {status, [versions: tables.versions] ++ opts}) do
      with {:ok, lock} <- Lock.acquire(directory, pid),
           {:ok, found} <- recovered(directory, tables, lock),
           :ok <- GenServer.call(pid, {:open, directory, lock, found}, :infinity) do
        {:ok, %__MODULE__{pid: pid, status: status}}
      else
        {:error, error} ->
          Process.unlink(pid)
          Process.exit(pid, :kill)
          {:error, error}
      end
    end
  end

  defp recovered(directory, tables, lock) do
    with {:error, error} <- Snapshot.recover(directory, tables) do
      Lock.release(lock)
      {:error, error}
    end
  end

  defp make_directory(directory) do
    cond do
      File.dir?(directory) ->
        :ok

      File.exists?(directory) ->
        Error.error(:store_failed, "#{directory} is a file, not a directory",
          remedy: "Give the store a directory of its own."
        )

      true ->
        with :ok <- File.mkdir_p(directory), :ok <- File.chmod(directory, 0o700) do
          Files.sync_directory(Path.dirname(directory))
        else
          {:error, reason} ->
            Error.error(:store_failed, "the directory #{directory} cannot be made: #{:file.format_error(reason)}")
        end
    end
  end

  @doc "Hands on a batch. The waiter, `{from, reply}`, is answered when it is on disk, with an error if it cannot be put there."
  @spec append(t() | nil, [Tables.fact()], {GenServer.from(), term()} | nil) :: :ok
  def append(disk, facts, waiter \\ nil)
  def append(nil, _facts, _waiter), do: :ok
  def append(_disk, [], nil), do: :ok

  def append(%__MODULE__{} = disk, facts, waiter) do
    :atomics.add(disk.status, @behind, 1)
    GenServer.cast(disk.pid, {:append, facts, waiter})
  end

  @doc "Whether more waits than should."
  @spec behind?(t() | nil) :: boolean()
  def behind?(nil), do: false
  def behind?(%__MODULE__{} = disk), do: :atomics.get(disk.status, @behind) > @max_behind

  @doc "Why nothing can be written any more, if it is so."
  @spec failure(t() | nil) :: Error.t() | nil
  def failure(nil), do: nil

  def failure(%__MODULE__{} = disk) do
    if :atomics.get(disk.status, @failed) == 0, do: nil, else: GenServer.call(disk.pid, :failure, :infinity)
  end

  @spec process(t() | nil) :: pid() | nil
  def process(nil), do: nil
  def process(%__MODULE__{pid: pid}), do: pid

  @doc "Everything is on disk, and the directory is free."
  @spec close(t() | nil) :: :ok
  def close(nil), do: :ok

  def close(%__MODULE__{pid: pid}) do
    Process.unlink(pid)
    GenServer.call(pid, :close, :infinity)
  catch
    # It has ended before: what it had written is there.
    :exit, {reason, {GenServer, :call, _}} when reason in [:noproc, :normal, :shutdown, :killed] -> :ok
  end

  # -- the process -----------------------------------------------------------------------------------------------------

  @impl true
  def init({status, opts}) do
    {:ok,
     %{
       status: status,
       compact_bytes: Keyword.get(opts, :compact_bytes, @compact_bytes),
       versions: Keyword.fetch!(opts, :versions),
       directory: nil,
       lock: nil,
       file: nil,
       generation: nil,
       size: 0,
       synced: 0,
       snapshot_bytes: 0,
       compactor: nil,
       retry_at: 0,
       waiting: [],
       waiting_bytes: 0,
       waiting_count: 0,
       waiters: [],
       failure: nil
     }}
  end

  # A crash report says nothing of what is in here: there are other people's values.
  @impl {:format_status, 1} in GenServer.behaviour_info(:callbacks)
  def format_status(status), do: Bridge.Private.status(status, __MODULE__)

  @impl true
  def handle_call({:open, directory, lock, found}, _from, state) do
    with {:ok, file, size} <- open_log(directory, found) do
      opened = %{
        state
        | directory: directory,
          lock: lock,
          file: file,
          size: size,
          synced: size,
          generation: found.generation,
          snapshot_bytes: found.snapshot_bytes
      }

      for path <- found.leftovers, do: File.rm_rf(path)
      {:reply, :ok, opened}
    else
      {:error, reason} ->
        Lock.release(lock)

        {:reply, Error.error(:store_failed, "the store #{directory} cannot be opened: #{:file.format_error(reason)}"),
         state}
    end
  end

  def handle_call(:failure, _from, state), do: next(state, {:reply, state.failure})

  def handle_call(:close, _from, state) do
    state = flush(state)
    # After it, damage to the last batch is not taken for a write that was cut.
    if state.failure == nil, do: write(%{state | waiters: [:closing]}, Log.frame([], state.size))
    _ = :file.close(state.file)
    stop_compactor(state)
    Lock.release(state.lock)
    {:stop, :normal, :ok, state}
  end

  @impl true
  def handle_cast({:append, facts, waiter}, state) do
    frame = Log.frame(facts, state.synced)
    bytes = state.waiting_bytes + :erlang.iolist_size(frame)
    waiters = if waiter, do: [waiter | state.waiters], else: state.waiters

    state = %{
      state
      | waiting: [state.waiting | frame],
        waiting_bytes: bytes,
        waiting_count: state.waiting_count + 1,
        waiters: waiters
    }

    # What is in the mailbox is written with it.
    if bytes > @flush_bytes, do: {:noreply, flush(state)}, else: {:noreply, state, 0}
  end

  @impl true
  def handle_info(:timeout, state), do: {:noreply, flush(state)}

  def handle_info({:DOWN, monitor, :process, _pid, reason}, %{compactor: {_, monitor}} = state) do
    state = %{state | compactor: nil}

    case reason do
      {:snapshot, bytes} ->
        next(%{state | snapshot_bytes: bytes, retry_at: 0}, :noreply)

      reason ->
        Logger.warning("the log of the store #{state.directory} could not be made a snapshot: #{inspect(reason)}")
        # All of it is in the logs: it is tried again when they have grown.
        next(%{state | retry_at: state.size + state.compact_bytes}, :noreply)
    end
  end

  def handle_info(_late, state), do: next(state, :noreply)

  # A message that is no batch must not keep the batches waiting.
  defp next(state, {:reply, reply}), do: if(waits?(state), do: {:reply, reply, state, 0}, else: {:reply, reply, state})
  defp next(state, :noreply), do: if(waits?(state), do: {:noreply, state, 0}, else: {:noreply, state})

  defp waits?(state), do: state.waiting_count > 0

  defp open_log(directory, %{generation: generation, cut: cut}) do
    path = Snapshot.log_path(directory, generation)

    with :ok <- if(cut == :new, do: Files.write(path, Log.header(:log, generation)), else: :ok),
         :ok <- if(is_integer(cut), do: cut(path, cut), else: :ok),
         {:ok, file} <- :file.open(path, [:append, :raw, :binary]),
         {:ok, size} <- :file.position(file, :eof),
         # What was read was on disk, or is from now on.
         :ok <- :file.sync(file) do
      {:ok, file, size}
    end
  end

  defp cut(path, at) do
    Logger.warning("#{path}: a write that was cut short at byte #{at} was removed")

    with {:ok, file} <- :file.open(path, [:read, :write, :raw, :binary]),
         {:ok, ^at} <- :file.position(file, at),
         :ok <- :file.truncate(file),
         :ok <- :file.sync(file) do
      :file.close(file)
    end
  end

  # -- writing ---------------------------------------------------------------------------------------------------------

  defp flush(%{waiting_count: 0} = state), do: state

  defp flush(state) do
    state = write(state, state.waiting)
    :atomics.sub(state.status, @behind, state.waiting_count)

    for {from, reply} <- Enum.reverse(state.waiters) do
      GenServer.reply(from, if(state.failure, do: {:error, state.failure}, else: reply))
    end

    rotate_if_due(%{state | waiting: [], waiting_bytes: 0, waiting_count: 0, waiters: []})
  end

  defp write(%{failure: nil} = state, frames) do
    with :ok <- :file.write(state.file, frames),
         # Where nobody waits, the next sync will do.
         :ok <- if(state.waiters == [], do: :ok, else: :file.datasync(state.file)) do
      size = state.size + :erlang.iolist_size(frames)
      %{state | size: size, synced: if(state.waiters == [], do: state.synced, else: size)}
    else
      {:error, reason} -> failed(state, reason)
    end
  end

  defp write(state, _frames), do: state

  defp failed(state, reason) do
    error = Error.new(:store_failed, "the store #{state.directory} could not be written: #{:file.format_error(reason)}")
    Logger.error(error.message)
    :atomics.put(state.status, @failed, 1)
    %{state | failure: error}
  end

  # -- snapshots -------------------------------------------------------------------------------------------------------

  defp rotate_if_due(%{failure: nil, compactor: nil} = state) do
    # Not before the log is as large as what it would be made: each byte is written again but so often.
    if state.size > max(state.compact_bytes, max(state.snapshot_bytes, state.retry_at)), do: rotate(state), else: state
  end

  defp rotate_if_due(state), do: state

  defp rotate(state) do
    generation = state.generation + 1
    path = Snapshot.log_path(state.directory, generation)

    # The old one says that there is a next when there is, and nothing is in that before it is said.
    with :ok <- :file.datasync(state.file),
         :ok <- Files.write(path, Log.header(:log, generation)),
         {:ok, file} <- :file.open(path, [:append, :raw, :binary]),
         :ok <- :file.write(state.file, Log.frame({:next, generation}, state.size)),
         :ok <- :file.datasync(state.file) do
      _ = :file.close(state.file)
      %{directory: directory, versions: versions} = state
      compactor = spawn_monitor(fn -> exit({:snapshot, Snapshot.make!(directory, generation, versions)}) end)
      size = Log.header_bytes()
      %{state | file: file, generation: generation, size: size, synced: size, retry_at: 0, compactor: compactor}
    else
      {:error, reason} -> failed(state, reason)
    end
  end

  # It can be stopped at any moment: what it makes counts when it is whole.
  defp stop_compactor(%{compactor: nil}), do: :ok

  defp stop_compactor(%{compactor: {pid, monitor}}) do
    Process.exit(pid, :kill)

    receive do
      {:DOWN, ^monitor, :process, ^pid, _reason} -> :ok
    end
  end
end
