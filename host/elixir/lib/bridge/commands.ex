defmodule Bridge.Commands do
  @moduledoc false
  # Who asks for a command, and waits: in the caller's own process. One command runs for all who come with its key.

  alias Bridge.{Command, Config, Error, Pool, Request, SessionStore, Telemetry}
  alias Bridge.Command.{Chunks, Terms}

  @doc """
  Runs a request, and waits for its result. If the caller dies, it is cancelled.

  `opts`: `deadline` (ms, callbacks included), `retries`, `idempotency_key`.
  """
  @spec run(Config.t(), String.t(), Request.request(), keyword()) :: {:ok, term()} | {:error, Error.t()}
  def run(cfg, session, request, opts) do
    while_open(cfg, fn ->
      with {:ok, terms} <- Terms.read(cfg, opts),
           {:ok, prepared} <- Request.prepare(cfg, session, request),
           :ok <- allowed(cfg, prepared) do
        if terms.key, do: once(cfg, session, prepared, terms), else: start_and_wait(cfg, session, prepared, terms, [])
      end
    end)
  end

  @doc """
  Goes on with a command that was interrupted, from what its journal has. `replies` and `rerun` are as
  `Bridge.Recovery.entries/4` takes them.
  """
  @spec resume(Config.t(), map(), %{String.t() => term()}, [String.t()], keyword()) ::
          {:ok, term()} | {:error, Error.t()}
  def resume(cfg, command, replies, rerun, opts) do
    while_open(cfg, fn ->
      with {:ok, terms} <- Terms.read(cfg, opts),
           {:ok, prepared} <- Request.prepare(cfg, command.session, command.params),
           :ok <- allowed(cfg, prepared) do
        terms = %{terms | key: command.key}
        more = [id: command.id, digest: command.digest, resumes: {replies, rerun}]
        start_and_wait(cfg, command.session, prepared, terms, more)
      end
    end)
  end

  @doc "From now on only what tools of running commands send is run."
  @spec close(Config.t()) :: :ok
  def close(cfg), do: Registry.put_meta(Config.process(cfg.name, :keys), :closed, true)

  # What is looked up in a store that is being closed raises, or finds no table.
  defp while_open(cfg, fun) do
    fun.()
  rescue
    error in Error ->
      if error.name == :host_closed, do: {:error, error}, else: reraise(error, __STACKTRACE__)

    error in ArgumentError ->
      # The first to go, and the last to come: all that it needs is there as long as it is.
      if Process.whereis(Config.process(cfg.name, :commands)),
        do: reraise(error, __STACKTRACE__),
        else: Error.error(:host_closed, "#{inspect(cfg.name)} is not running")
  end

  defp allowed(cfg, prepared) do
    if Pool.quarantine(cfg) == [], do: :ok, else: Pool.check_quarantine(cfg, Request.digest(prepared))
  end

  defp start_and_wait(cfg, session, prepared, terms, more) do
    case start(cfg, session, prepared, terms, more) do
      {:ok, reading} ->
        with :gone <- await(reading, :infinity), do: ended(:noproc)

      {:error, error} ->
        {:error, error}

      # Somebody else goes on with it at this moment.
      {:already, _pid} ->
        Bridge.Recovery.none(cfg, more[:id])
    end
  end

  # The ref is an alias: what is sent to it is dropped once nobody listens any more.
  defp start(cfg, session, prepared, terms, more) do
    ref = :erlang.alias()
    trace = Telemetry.trace(cfg)
    asked = %{caller: self(), ref: ref, leader: Process.group_leader(), trace: trace}
    child = {Command, {cfg, session, prepared, terms, asked, more}}

    with {:error, reason} <- start_child(cfg, child) do
      :erlang.unalias(ref)

      case reason do
        %Error{} -> {:error, reason}
        {:shutdown, {:already, pid}} -> {:already, pid}
        _other -> Error.error(:internal_error, "the command could not be started: #{inspect(reason)}")
      end
    else
      {:ok, pid} -> {:ok, {pid, ref, Process.monitor(pid)}}
    end
  end

  defp start_child(cfg, child) do
    DynamicSupervisor.start_child(Config.process(cfg.name, :commands), child)
  catch
    :exit, _reason -> Error.error(:host_closed, "#{inspect(cfg.name)} is not running")
  end

  # `:gone` if it had ended before it heard of who waits.
  defp await({pid, ref, monitor}, timeout) do
    receive do
      {^ref, {:done, result}} ->
        forget(ref, monitor)
        result

      {:DOWN, ^monitor, :process, _pid, reason} ->
        forget(ref, monitor)
        if reason in [:normal, :noproc], do: :gone, else: ended(reason)
    after
      timeout ->
        forget(ref, monitor)
        GenServer.cast(pid, {:leave, ref})
        :timeout
    end
  end

  # From here on nothing more comes, and of what had come nothing is left.
  defp forget(ref, monitor) do
    Process.demonitor(monitor, [:flush])
    :erlang.unalias(ref)
    flush(ref)
  end

  defp flush(ref) do
    receive do
      {^ref, _} -> flush(ref)
    after
      0 -> :ok
    end
  end

  defp ended(reason) do
    if reason == :noproc or Command.stopping?(reason),
      do: {:error, Command.stopped()},
      else: Error.error(:internal_error, "the command's process failed: #{Bridge.Private.format_exit(reason)}")
  end

  # -- idempotency keys ------------------------------------------------------------------

  # Only what succeeded is remembered. Whoever gives up leaves the others waiting; the command is cancelled with the last.
  defp once(cfg, session, prepared, terms) do
    digest = Request.digest(prepared)

    with :ok <- not_itself(session, terms),
         :error <- SessionStore.result(cfg, session, terms.key) do
      case Registry.lookup(Config.process(cfg.name, :keys), {session, terms.key}) do
        [{pid, known}] ->
          with :ok <- Terms.check_same(terms.key, known, digest), do: join(cfg, session, prepared, terms, pid)

        [] ->
          begin(cfg, session, prepared, terms, digest)
      end
    else
      {:ok, %{digest: known, value: value}} -> with :ok <- Terms.check_same(terms.key, known, digest), do: {:ok, value}
      {:error, error} -> {:error, error}
    end
  end

  defp not_itself(session, terms) do
    if {session, terms.key} in terms.keys do
      Error.error(
        :conflict,
        "the command with the key #{inspect(terms.key)} would wait for itself: its own tool sends it again",
        remedy: "Give the inner command a key of its own."
      )
    else
      :ok
    end
  end

  defp begin(cfg, session, prepared, terms, digest) do
    case start(cfg, session, prepared, terms, digest: digest) do
      {:ok, reading} -> with :gone <- await(reading, :infinity), do: ended(:noproc)
      # Somebody was faster.
      {:already, _pid} -> once(cfg, session, prepared, terms)
      {:error, error} -> {:error, error}
    end
  end

  defp join(cfg, session, prepared, terms, pid) do
    ref = :erlang.alias()
    monitor = Process.monitor(pid)
    GenServer.cast(pid, {:join, self(), ref, terms.depth})

    case await({pid, ref, monitor}, Terms.patience(terms)) do
      :timeout ->
        Error.error(
          :deadline_exceeded,
          "#{prepared.subject} still runs for another caller with the key #{inspect(terms.key)}"
        )

      :gone ->
        once(cfg, session, prepared, terms)

      # The time of whoever began it was up, not ours.
      {:error, %Error{name: :deadline_exceeded} = error} ->
        if Terms.out_of_time?(terms), do: {:error, error}, else: once(cfg, session, prepared, terms)

      result ->
        result
    end
  end

  # -- streams -----------------------------------------------------------------------------

  @doc "Begins a stream, for the process that calls this to read with `next/1`."
  @spec stream(Config.t(), String.t(), Request.request(), keyword()) :: {:ok, term()} | {:error, Error.t()}
  def stream(cfg, session, request, opts) do
    while_open(cfg, fn ->
      with {:ok, terms} <- Terms.read(cfg, Keyword.delete(opts, :idempotency_key)),
           {:ok, prepared} <- Request.prepare(cfg, session, request),
           :ok <- allowed(cfg, prepared) do
        start(cfg, session, prepared, terms, chunks: Chunks.new())
      end
    end)
  end

  @doc "The next value; when the generator has ended, what it returned."
  @spec next(term()) :: {:ok, term()} | {:done, term()} | {:error, Error.t()}
  def next({pid, ref, monitor}) do
    # In this order: what was yielded before the end is read before it.
    receive do
      {^ref, {:chunk, value}} ->
        GenServer.cast(pid, :consumed)
        {:ok, value}

      {^ref, {:done, {:ok, returned}}} ->
        {:done, returned}

      {^ref, {:done, {:error, error}}} ->
        {:error, error}

      {:DOWN, ^monitor, :process, _pid, reason} ->
        ended(reason)
    end
  end

  @doc "Stops the generator, if it still runs; what it had sent is dropped."
  @spec abandon(term()) :: :ok
  def abandon({pid, ref, monitor}) do
    GenServer.cast(pid, {:leave, ref})
    forget(ref, monitor)
  end
end
