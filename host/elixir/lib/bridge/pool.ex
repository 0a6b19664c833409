defmodule Bridge.Pool do
  @moduledoc false
  # The kernels of one bridge as places for commands: who gets which, who waits, who is held back. The process beneath it
  # is thin: `Bridge.Pool.Desk` decides. It starts no kernels and ends none; it is told of them by their processes, to
  # which it sends
  #
  # - `{:bridge_recycle, reason}` once, when a kernel has served long enough ("commands", "age", "rss"). It goes on getting
  #   commands until it is drained: time to start another first.
  # - `{:bridge_drained, id}` after `drain/2`, when nothing runs on it any more.

  use GenServer

  alias Bridge.{Config, Error, Telemetry}
  alias Bridge.Pool.{Desk, Orphans, Quarantine, Window}

  require Logger

  @tick_ms 1_000
  @defaults_when_unsaid %{commands: nil, age: nil, rss_bytes: nil}

  @type place :: %{pid: pid(), id: String.t(), lease: reference()}
  @type cfg :: %{:name => atom(), optional(any()) => any()}

  @spec start_link(cfg()) :: GenServer.on_start()
  def start_link(cfg), do: GenServer.start_link(__MODULE__, cfg, name: process(cfg))

  @spec child_spec(cfg()) :: Supervisor.child_spec()
  def child_spec(cfg), do: %{id: __MODULE__, start: {__MODULE__, :start_link, [cfg]}}

  # -- a command's place -------------------------------------------------------------------

  @doc """
  A place for the command, for which it may have to wait: at most `timeout` ms.

  `ask` has `session` and `subject` (what people call the command), and may have `exclude` (ids of kernels to avoid if
  there is another), `alone` (a kernel to itself), `nested` (sent by a tool of a running command: it neither waits in the
  queue nor counts against the concurrency, for its outer command holds a place already) and `trace` (a map that goes
  into the telemetry of it). Whoever dies while it waits, or while it has the place, gives it up by that.

  Errors: `:queue_full`, `:circuit_open`, `:deadline_exceeded`, `:host_closed`, and what `hopeless/2` was told.
  """
  @spec checkout(cfg(), Desk.ask(), timeout()) :: {:ok, place()} | {:error, Error.t()}
  def checkout(cfg, ask, timeout) do
    granted(cfg, ask, call(cfg, {:checkout, Map.take(ask, [:session, :subject, :exclude, :alone, :nested]), timeout}))
  end

  defp granted(cfg, ask, answer) do
    case answer do
      {:ok, place, grant} ->
        tell_route(cfg, ask, place, grant)
        {:ok, place}

      {:rejected, error, figures} ->
        Telemetry.execute(cfg, [:bridge, :pool, :queue, :reject], figures, Map.take(ask, [:session, :subject]))
        {:error, error}

      {:error, error} ->
        {:error, error}
    end
  end

  @doc "As `checkout/3`, without waiting: `checked_out/4` knows the answer among the messages that come."
  @spec request(cfg(), Desk.ask(), timeout()) :: term()
  def request(cfg, ask, timeout) do
    asked = Map.take(ask, [:session, :subject, :exclude, :alone, :nested])
    :gen_server.send_request(process(cfg), {:checkout, asked, timeout})
  end

  @doc "What came of a request, if the message says so; `:no_reply` if it is another's."
  @spec checked_out(cfg(), Desk.ask(), term(), term()) :: {:ok, place()} | {:error, Error.t()} | :no_reply
  def checked_out(cfg, ask, message, request) do
    case :gen_server.check_response(message, request) do
      :no_reply -> :no_reply
      {:reply, answer} -> granted(cfg, ask, answer)
      {:error, _gone} -> Error.error(:host_closed, "#{inspect(cfg.name)} is not running")
    end
  end

  @doc "Who called `request/3` and waits still is nested from now on: a tool of a running command waits for it."
  @spec hurry(cfg()) :: :ok
  def hurry(cfg), do: GenServer.cast(process(cfg), {:hurry, self()})

  # By the process that asked: the pool's own has enough to do.
  defp tell_route(cfg, ask, place, grant) do
    measured = %{
      system_time: System.system_time(),
      queue: native(grant.queue_us),
      candidates: grant.candidates,
      expected: grant.expected_us |> round() |> native()
    }

    said = %{kernel: place.id, strategy: grant.strategy, subject: ask.subject, session: ask.session}
    Telemetry.execute(cfg, [:bridge, :pool, :route], measured, Map.merge(Map.get(ask, :trace) || %{}, said))
  end

  @doc """
  Give the place back, with what became of the command: `{:error, name}` is what the kernel answered, `:died` that the
  kernel did, `:deadline` that it let the deadline pass without a word, `:cancelled` that nobody wanted to know.
  """
  @spec checkin(cfg(), reference(), Desk.outcome()) :: :ok
  def checkin(cfg, lease, outcome), do: GenServer.cast(process(cfg), {:checkin, lease, outcome})

  # -- kernels ------------------------------------------------------------------------------

  @doc """
  A kernel can be given commands from now on, until its process (`pid`) ends or says `down/3`. `limits` are those of its
  handshake (`"max_commands"`).
  """
  @spec ready(cfg(), %{id: String.t(), pid: pid(), os_pid: integer(), limits: map()}) :: :ok | {:error, Error.t()}
  def ready(cfg, info), do: call(cfg, {:ready, info})

  @doc "The kernel is gone. What runs there is for its callers to give back."
  @spec down(cfg(), String.t(), term()) :: :ok
  def down(cfg, id, _reason), do: GenServer.cast(process(cfg), {:down, id})

  @doc "What the kernel's process has learnt of it: `%{rss: bytes}`, `%{unresponsive: boolean}`."
  @spec report(cfg(), String.t(), map()) :: :ok
  def report(cfg, id, news), do: GenServer.cast(process(cfg), {:report, id, news})

  @doc "Send that kernel nothing more. Its process gets `{:bridge_drained, id}` when nothing runs there any more."
  @spec drain(cfg(), String.t()) :: :ok | {:error, Error.t()}
  def drain(cfg, id), do: call(cfg, {:drain, id})

  @doc """
  Why no kernel will ever be ready, or nil when one may be again. As long as none is there, commands that wait get that
  error.
  """
  @spec hopeless(cfg(), Error.t() | nil) :: :ok
  def hopeless(cfg, error), do: GenServer.cast(process(cfg), {:hopeless, error})

  @doc "Refuse every command from now on, also those that wait, and wait for those that run: `:timeout` if they take longer."
  @spec close(cfg(), timeout()) :: :ok | :timeout
  def close(cfg, timeout) do
    case call(cfg, {:close, timeout}) do
      {:error, _closed_already} -> :ok
      answer -> answer
    end
  end

  @doc "What there is and what it does. Times in ms."
  @spec status(cfg()) :: {:ok, map()} | {:error, Error.t()}
  def status(cfg), do: call(cfg, :status)

  # -- quarantine -----------------------------------------------------------------------------

  @doc "Whether that command may run: `{:error, %Error{name: :quarantined}}` if not."
  @spec check_quarantine(cfg(), binary()) :: :ok | {:error, Error.t()}
  def check_quarantine(cfg, digest), do: Quarantine.check(process(cfg), digest)

  @spec quarantined?(cfg(), binary()) :: boolean()
  def quarantined?(cfg, digest), do: check_quarantine(cfg, digest) != :ok

  @doc "Run that command no more; `info` has `name`, `session`, `kernels` (how many it ended), `last`. The error for its caller."
  @spec quarantine(cfg(), binary(), map()) :: Error.t()
  def quarantine(cfg, digest, info), do: Quarantine.add(process(cfg), digest, info)

  @doc "What is in quarantine, the oldest first."
  @spec quarantine(cfg()) :: [Quarantine.poison()]
  def quarantine(cfg), do: Quarantine.poisons(process(cfg))

  @doc "Let every command of that name out."
  @spec release(cfg(), String.t()) :: :ok | {:error, Error.t()}
  def release(cfg, name), do: Quarantine.release(process(cfg), name)

  # -- the process ------------------------------------------------------------------------------

  # `callers` has who waits for its reply, `owners` whose place it is: both by the reference that names the command and
  # monitors its process.
  @impl true
  def init(cfg) do
    Quarantine.open(process(cfg))
    recycle = Map.merge(@defaults_when_unsaid, cfg.recycle || %{})

    desk =
      Desk.new(%{
        concurrency: cfg.concurrency,
        queue: cfg.queue,
        routing: cfg.routing,
        # As in the Python host: what is not said is the default, and there is no pool without.
        breaker: cfg.breaker || %{},
        recycle: recycle,
        seed: :erlang.unique_integer()
      })

    if recycle.age, do: Process.send_after(self(), :tick, tick_ms(recycle.age))

    {:ok,
     %{
       cfg: cfg,
       desk: desk,
       recycle: recycle,
       strategy: strategy(cfg.routing),
       callers: %{},
       timers: %{},
       kernels: %{},
       closing: nil,
       warned: nil
     }, {:continue, :sweep}}
  end

  @impl true
  def handle_continue(:sweep, state) do
    for swept <- Orphans.sweep() do
      measured = %{killed: length(swept.killed)}
      Telemetry.execute(state.cfg, [:bridge, :pool, :sweep], measured, %{host: swept.host, reason: "orphaned"})
    end

    {:noreply, state}
  end

  defp strategy(routing) when is_atom(routing), do: Atom.to_string(routing)
  defp strategy(_function), do: "function"

  defp tick_ms(age), do: age |> div(8) |> max(1) |> min(@tick_ms)

  @impl true
  def handle_call({:checkout, ask, timeout}, {pid, _tag} = from, state) do
    ref = Process.monitor(pid)
    state = run(%{state | callers: Map.put(state.callers, ref, from)}, &Desk.checkout(&1, ref, ask, now()))

    if is_integer(timeout) and Map.has_key?(state.callers, ref) do
      timer = Process.send_after(self(), {:out_of_time, ref}, timeout)
      {:noreply, %{state | timers: Map.put(state.timers, ref, timer)}}
    else
      {:noreply, state}
    end
  end

  def handle_call({:ready, info}, _from, state) do
    state = forget_kernel(state, info.id)
    monitor = Process.monitor(info.pid)
    info = Map.put(info, :most, most_commands(info.limits, state.cfg.concurrency))
    state = %{state | kernels: Map.put(state.kernels, monitor, info.id)}
    {:reply, :ok, run(state, &Desk.join(&1, info, now()))}
  end

  def handle_call({:drain, id}, _from, state) do
    case Desk.drain(state.desk, id, now()) do
      {:ok, desk, effects} ->
        {:reply, :ok, perform(%{state | desk: desk}, effects)}

      :error ->
        known = state.desk.kernels |> Map.keys() |> Enum.sort() |> Enum.join(", ")
        there = if known == "", do: "none", else: known
        {:reply, Error.error(:not_found, "there is no kernel #{inspect(id)}", remedy: "There are: #{there}."), state}
    end
  end

  def handle_call({:close, timeout}, from, state) do
    if is_integer(timeout), do: Process.send_after(self(), {:give_up_closing, from}, timeout)
    state = run(state, &Desk.close/1)
    {:noreply, closed(%{state | closing: [from | state.closing || []]})}
  end

  def handle_call(:status, _from, state), do: {:reply, {:ok, describe(state)}, state}

  @impl true
  def handle_cast({:checkin, lease, outcome}, state) do
    Process.demonitor(lease, [:flush])
    {:noreply, state |> run(&Desk.checkin(&1, lease, outcome, now())) |> closed()}
  end

  def handle_cast({:hurry, pid}, state) do
    waiting = for {ref, {^pid, _tag}} <- state.callers, do: ref
    {:noreply, Enum.reduce(waiting, state, fn ref, state -> run(state, &Desk.hurry(&1, ref, now())) end)}
  end

  def handle_cast({:down, id}, state), do: {:noreply, state |> forget_kernel(id) |> run(&Desk.leave(&1, id, now()))}
  def handle_cast({:report, id, news}, state), do: {:noreply, run(state, &Desk.report(&1, id, news, now()))}
  def handle_cast({:hopeless, error}, state), do: {:noreply, run(state, &Desk.set_hopeless(&1, error))}

  @impl true
  def handle_info({:DOWN, monitor, :process, _pid, _reason}, state) do
    case Map.pop(state.kernels, monitor) do
      {nil, _kernels} ->
        state = %{forget_timer(state, monitor) | callers: Map.delete(state.callers, monitor)}
        {:noreply, state |> run(&Desk.withdraw(&1, monitor, now())) |> closed()}

      {id, kernels} ->
        {:noreply, run(%{state | kernels: kernels}, &Desk.leave(&1, id, now()))}
    end
  end

  def handle_info({:out_of_time, ref}, state) do
    state = %{state | timers: Map.delete(state.timers, ref)}

    if Map.has_key?(state.callers, ref) do
      error = Error.new(:deadline_exceeded, "the deadline passed while the command waited for a kernel")
      {:noreply, state |> run(&Desk.withdraw(&1, ref, now())) |> refuse(ref, {:error, error})}
    else
      {:noreply, state}
    end
  end

  def handle_info({:give_up_closing, from}, state) do
    if from in (state.closing || []), do: GenServer.reply(from, :timeout)
    {:noreply, %{state | closing: List.delete(state.closing || [], from)}}
  end

  def handle_info(:tick, state) do
    Process.send_after(self(), :tick, tick_ms(state.recycle.age))
    {:noreply, run(state, &Desk.tick(&1, now()))}
  end

  # A name that anybody may send to.
  def handle_info(_stray, state), do: {:noreply, state}

  # A crash report says nothing of what is in here.
  @impl {:format_status, 1} in GenServer.behaviour_info(:callbacks)
  def format_status(status), do: Bridge.Private.status(status, __MODULE__)

  # -- what the desk wants done ------------------------------------------------------------------

  defp run(state, change) do
    {desk, effects} = change.(state.desk)
    perform(%{state | desk: desk}, effects)
  end

  defp perform(state, effects), do: Enum.reduce(effects, state, &perform_one/2)

  defp perform_one({:grant, ref, grant}, state) do
    {from, callers} = Map.pop!(state.callers, ref)
    place = %{pid: grant.pid, id: grant.id, lease: ref}
    GenServer.reply(from, {:ok, place, Map.put(grant, :strategy, state.strategy)})
    forget_timer(%{state | callers: callers}, ref)
  end

  defp perform_one({:fail, ref, error, nil}, state), do: refuse(state, ref, {:error, error})
  defp perform_one({:fail, ref, error, figures}, state), do: refuse(state, ref, {:rejected, error, figures})

  defp perform_one({:drained, kernel}, state) do
    send(kernel.pid, {:bridge_drained, kernel.id})
    state
  end

  defp perform_one({:recycle, kernel, reason}, state) do
    send(kernel.pid, {:bridge_recycle, reason})
    measured = %{completed: kernel.completed, age: native(now() - kernel.born), rss: kernel.rss}
    said = %{kernel: kernel.id, pid: kernel.os_pid, reason: reason}
    Telemetry.execute(state.cfg, [:bridge, :pool, :recycle], measured, said)
    state
  end

  defp perform_one({:breaker, change}, state) do
    event = [:bridge, :pool, :breaker, if(change.opened, do: :open, else: :close)]
    measured = %{failures: change.failures, cooldown: native(change.cooldown_us)}
    said = %{subject: change.command, kernel: change.kernel, reason: change.reason}
    Telemetry.execute(state.cfg, event, measured, said)
    state
  end

  # Once, and again when it fails in another way: it would be asked for each command.
  defp perform_one({:routing_failed, why}, %{warned: why} = state), do: state

  defp perform_one({:routing_failed, why}, state) do
    Logger.error("#{inspect(state.cfg.name)}: the routing function failed, the least loaded kernel is taken: #{why}")
    %{state | warned: why}
  end

  defp refuse(state, ref, answer) do
    {from, callers} = Map.pop!(state.callers, ref)
    Process.demonitor(ref, [:flush])
    GenServer.reply(from, answer)
    forget_timer(%{state | callers: callers}, ref)
  end

  defp forget_timer(state, ref) do
    case Map.pop(state.timers, ref) do
      {nil, _timers} ->
        state

      {timer, timers} ->
        Process.cancel_timer(timer)
        %{state | timers: timers}
    end
  end

  defp forget_kernel(state, id) do
    case Enum.find(state.kernels, fn {_monitor, other} -> other == id end) do
      nil ->
        state

      {monitor, ^id} ->
        Process.demonitor(monitor, [:flush])
        %{state | kernels: Map.delete(state.kernels, monitor)}
    end
  end

  defp closed(%{closing: [_ | _] = closing, desk: %{leases: leases}} = state) when map_size(leases) == 0 do
    Enum.each(closing, &GenServer.reply(&1, :ok))
    %{state | closing: []}
  end

  defp closed(state), do: state

  defp describe(%{desk: desk} = state) do
    now = now()

    kernels =
      for {_, kernel} <- desk.kernels do
        state =
          cond do
            kernel.draining -> :draining
            kernel.unresponsive -> :unresponsive
            true -> :ready
          end

        kernel
        |> Map.take([:id, :pid, :os_pid, :in_flight, :completed, :capacity, :rss])
        |> Map.merge(%{state: state, age: div(now - kernel.born, 1_000), error_rate: Window.rate(kernel.recent)})
      end

    %{
      kernels: Enum.sort_by(kernels, &{-&1.age, &1.id}),
      waiting: Desk.waiting(desk),
      running: map_size(desk.leases),
      strategy: state.strategy,
      closed: desk.closed
    }
  end

  defp most_commands(limits, otherwise) do
    case limits["max_commands"] || limits[:max_commands] do
      most when is_integer(most) and most > 0 -> most
      _ -> otherwise
    end
  end

  # -- small things ---------------------------------------------------------------------------------

  # Bounded by the command's own deadline, which the pool keeps: it answers in time, or is gone.
  defp call(cfg, request) do
    GenServer.call(process(cfg), request, :infinity)
  catch
    :exit, {reason, {GenServer, :call, _}} when reason in [:noproc, :normal, :shutdown, :killed] ->
      {:error, Error.new(:host_closed)}

    :exit, {{:shutdown, _}, {GenServer, :call, _}} ->
      {:error, Error.new(:host_closed)}

    # It failed, which OTP has logged, and is started again by its supervisor.
    :exit, {_crash, {GenServer, :call, _}} ->
      {:error,
       Error.new(:host_closed, "the pool failed while the command waited", remedy: "Call again.", retryable: true)}
  end

  defp process(cfg), do: Config.process(cfg.name, :pool)
  defp now, do: System.monotonic_time(:microsecond)
  defp native(us), do: System.convert_time_unit(us, :microsecond, :native)
end
