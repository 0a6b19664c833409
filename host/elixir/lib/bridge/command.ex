defmodule Bridge.Command do
  @moduledoc false
  # One command, in a process of its own for as long as it runs: its place in a kernel, its attempts, its callbacks, its
  # commit. Whoever asked for it is monitored: when nobody waits any more it is cancelled, in the kernel too.

  use GenServer, restart: :temporary

  alias Bridge.{Callbacks, Config, Error, Journal, Kernel, Pool, Request, SessionStore, Telemetry, Value}
  alias Bridge.Command.{Chunks, Current}
  alias Bridge.Store.Staged
  alias Bridge.Telemetry.Trace

  require Logger

  # From the next attempt on it runs alone: if that kernel dies too, it is proven who did it.
  @shared_attempts 2
  # How long after its deadline a kernel may still say so itself.
  @late_ms 500
  @max_nesting 64
  @max_key 255
  # 46 days: what a timer takes.
  @longest_ms 4_000_000_000
  # Handlers of telemetry are called there. A command needs them both: it would wait for who waits for it.
  @needed [{Bridge.Kernel, :init, 1}, {Bridge.Pool, :init, 1}]

  @derive {Inspect, only: [:id, :session, :attempt]}
  @enforce_keys [:cfg, :session, :prepared, :terms, :id, :trace]
  defstruct @enforce_keys ++
              [
                :place,
                :ref,
                :asked,
                :ask,
                :began,
                :tried,
                :leader,
                :chunks,
                :timer,
                :digest,
                begun?: false,
                resumed?: false,
                waiters: %{},
                attempt: 0,
                died: 0,
                avoid: [],
                resent: false,
                again?: false,
                tools: %{},
                journal: %Journal{},
                staged: nil
              ]

  @type t :: %__MODULE__{}

  # -- for who asks --------------------------------------------------------------------

  @doc """
  Runs a request, and waits for its result. If the caller dies, it is cancelled.

  `opts`: `deadline` (ms, callbacks included), `retries`, `idempotency_key`.
  """
  @spec run(Config.t(), String.t(), Request.request(), keyword()) :: {:ok, term()} | {:error, Error.t()}
  def run(cfg, session, request, opts) do
    while_open(cfg, fn ->
      with {:ok, terms} <- terms(cfg, opts),
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
      with {:ok, terms} <- terms(cfg, opts),
           {:ok, prepared} <- Request.prepare(cfg, command.session, command.params),
           :ok <- allowed(cfg, prepared) do
        terms = %{terms | key: command.key}
        more = [id: command.id, digest: command.digest, resumes: {replies, rerun}]
        start_and_wait(cfg, command.session, prepared, terms, more)
      end
    end)
  end

  # What is looked up in a store that is being closed raises, or finds no table.
  defp while_open(cfg, fun) do
    fun.()
  rescue
    error in Error ->
      if error.name == :host_closed, do: {:error, error}, else: reraise(error, __STACKTRACE__)

    error in ArgumentError ->
      with {:ok, _tables} <- Bridge.Store.Owner.tables(cfg), do: reraise(error, __STACKTRACE__)
  end

  defp allowed(cfg, prepared) do
    if Pool.quarantine(cfg) == [], do: :ok, else: Pool.check_quarantine(cfg, Request.digest(prepared))
  end

  defp terms(cfg, opts) do
    {deadline, retries, key} = {opts[:deadline], Keyword.get(opts, :retries, cfg.retries), opts[:idempotency_key]}
    current = Current.get(cfg.name)

    cond do
      deadline != nil and not (is_number(deadline) and deadline > 0 and deadline <= @longest_ms) ->
        invalid(
          "deadline is how many milliseconds there are, more than 0 and at most #{@longest_ms}, not #{inspect(deadline)}"
        )

      not (is_integer(retries) and retries >= 0) ->
        invalid("retries is how often a command may run again, 0 or more, not #{inspect(retries)}")

      key != nil and not (is_binary(key) and String.valid?(key) and String.length(key) in 1..@max_key) ->
        invalid(
          "an idempotency key is a string of 1 to #{@max_key} characters, not #{inspect(key, printable_limit: 80)}"
        )

      Process.get(:"$initial_call") in @needed ->
        Error.error(
          :invalid_params,
          "a handler of telemetry cannot run a command here: it is called by what runs commands",
          remedy: "Let it send a message to a process of yours, and call from there."
        )

      current != nil and current.depth >= @max_nesting ->
        Error.error(:limit_exceeded, "commands are nested #{current.depth + 1} deep, at most #{@max_nesting}",
          remedy: "A tool seems to call, through commands, itself."
        )

      true ->
        until = [deadline && now() + deadline, current && current.until] |> Enum.filter(& &1) |> Enum.min(fn -> nil end)
        depth = if current, do: current.depth + 1, else: 0
        keys = if current, do: current.keys, else: []
        {:ok, %{until: until, retries: retries, key: key, depth: depth, keys: keys}}
    end
  end

  defp invalid(message), do: Error.error(:invalid_params, message)

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
    child = {__MODULE__, {cfg, session, prepared, terms, asked, more}}

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
    if reason == :noproc or stopping?(reason),
      do: stopped(),
      else: Error.error(:internal_error, "the command's process failed: #{Bridge.Private.format_exit(reason)}")
  end

  defp stopping?(reason), do: reason == :shutdown or match?({:shutdown, _}, reason)
  defp stopped, do: Error.error(:host_closed, "Bridge was stopped while the command ran")

  # -- idempotency keys ------------------------------------------------------------------

  # Only what succeeded is remembered. Whoever gives up leaves the others waiting; the command is cancelled with the last.
  defp once(cfg, session, prepared, terms) do
    digest = Request.digest(prepared)

    with :ok <- not_itself(session, terms),
         :error <- SessionStore.result(cfg, session, terms.key) do
      case Registry.lookup(Config.process(cfg.name, :keys), {session, terms.key}) do
        [{pid, known}] -> with :ok <- same(terms.key, known, digest), do: join(cfg, session, prepared, terms, pid)
        [] -> begin(cfg, session, prepared, terms, digest)
      end
    else
      {:ok, %{digest: known, value: value}} -> with :ok <- same(terms.key, known, digest), do: {:ok, value}
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

  defp same(_key, digest, digest), do: :ok

  defp same(key, _known, _digest) do
    Error.error(:conflict, "the idempotency key #{inspect(key)} was used for another command",
      remedy: "One key names one command with its arguments: choose another."
    )
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
    GenServer.cast(pid, {:join, self(), ref})
    timeout = if terms.until, do: max(round(terms.until - now()), 0) + @late_ms, else: :infinity

    case await({pid, ref, monitor}, timeout) do
      :timeout ->
        Error.error(
          :deadline_exceeded,
          "#{prepared.subject} still runs for another caller with the key #{inspect(terms.key)}"
        )

      :gone ->
        once(cfg, session, prepared, terms)

      # The time of whoever began it was up, not ours.
      {:error, %Error{name: :deadline_exceeded} = error} ->
        if terms.until == nil or now() < terms.until, do: once(cfg, session, prepared, terms), else: {:error, error}

      result ->
        result
    end
  end

  # -- streams -----------------------------------------------------------------------------

  @doc "Begins a stream, for the process that calls this to read with `next/1`."
  @spec stream(Config.t(), String.t(), Request.request(), keyword()) :: {:ok, term()} | {:error, Error.t()}
  def stream(cfg, session, request, opts) do
    while_open(cfg, fn ->
      with {:ok, terms} <- terms(cfg, Keyword.delete(opts, :idempotency_key)),
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

  # -- the process ----------------------------------------------------------------------------

  @spec start_link(tuple()) :: GenServer.on_start()
  def start_link(args), do: GenServer.start_link(__MODULE__, args)

  @impl true
  def init({cfg, session, prepared, terms, asked, more}) do
    Process.group_leader(self(), asked.leader)
    Process.flag(:trap_exit, true)

    state = %__MODULE__{
      cfg: cfg,
      session: session,
      prepared: prepared,
      terms: terms,
      id: more[:id] || Base.encode16(:rand.bytes(12), case: :lower),
      trace: asked.trace,
      leader: asked.leader,
      digest: more[:digest],
      chunks: more[:chunks],
      staged: Staged.new(),
      waiters: %{asked.ref => {asked.caller, Process.monitor(asked.caller)}},
      began: System.monotonic_time()
    }

    # Nothing else is done here: whoever starts a command waits for this.
    with :ok <- register(state, more[:resumes]), do: {:ok, state, {:continue, {:begin, more[:resumes]}}}
  end

  # What only one may go on with at a time: its key, and its id if it was interrupted.
  defp register(state, resumes) do
    of_key = if state.terms.key, do: [{state.session, state.terms.key}], else: []
    of_id = if resumes, do: [{:resumed, state.id}], else: []

    Enum.reduce_while(of_id ++ of_key, :ok, fn name, :ok ->
      case Registry.register(Config.process(state.cfg.name, :keys), name, state.digest) do
        {:ok, _owner} -> {:cont, :ok}
        {:error, {:already_registered, pid}} -> {:halt, {:stop, {:shutdown, {:already, pid}}}}
      end
    end)
  end

  @impl true
  def handle_continue({:begin, resumes}, state) do
    with {:ok, state} <- before(state, resumes), :ok <- begun(state) do
      state = %{state | begun?: true}
      tell(state, :start, %{system_time: System.system_time()}, %{})
      {:noreply, acquire(state)}
    else
      {:done, result} -> turn_away(state, result)
      {:error, error} -> turn_away(state, {:error, error})
    end
  end

  # What there is of it already. Looked up only now that nobody else can run it: whoever did has put it there.
  defp before(%{terms: %{key: nil}} = state, nil), do: {:ok, state}

  defp before(state, nil) do
    with :error <- SessionStore.result(state.cfg, state.session, state.terms.key),
         # Interrupted, or its process was killed: nobody runs it.
         {:ok, command} <- SessionStore.command_with_key(state.cfg, state.session, state.terms.key),
         :ok <- same(state.terms.key, command.digest, state.digest) do
      goes_on(state, command, %{}, [])
    else
      :error ->
        {:ok, state}

      {:ok, %{digest: known, value: value}} ->
        with :ok <- same(state.terms.key, known, state.digest), do: {:done, {:ok, value}}

      {:error, error} ->
        {:error, error}
    end
  end

  defp before(state, {replies, rerun}) do
    with {:ok, command} <- Bridge.Recovery.find(state.cfg, state.id), do: goes_on(state, command, replies, rerun)
  end

  defp goes_on(state, command, replies, rerun) do
    with {:ok, entries} <- Bridge.Recovery.entries(state.cfg, command, replies, rerun) do
      {:ok, %{state | id: command.id, journal: Journal.new(entries), attempt: command.attempt, resumed?: true}}
    end
  end

  defp begun(state) do
    prepared = state.prepared

    command = %{
      id: state.id,
      session: state.session,
      method: prepared.method,
      subject: prepared.subject,
      params: prepared.request,
      key: state.terms.key,
      digest: state.digest,
      attempt: max(state.attempt, 1),
      sealed: prepared.secret?
    }

    with :ok <- SessionStore.begin_command(state.cfg, command),
         do: SessionStore.busy(state.cfg, state.session, self())
  end

  # It has not begun, and there is nothing to end.
  defp turn_away(state, result) do
    answer_all(state, result)
    {:stop, :normal, state}
  end

  defp answer_all(state, result) do
    for {ref, _waiter} <- state.waiters, do: send(ref, {ref, {:done, result}})
    :ok
  end

  # -- a place -----------------------------------------------------------------------------------

  defp acquire(state) do
    ask = %{
      session: state.session,
      subject: command_name(state.prepared),
      exclude: state.avoid,
      alone: state.died >= @shared_attempts,
      nested: state.terms.depth > 0,
      trace: Trace.metadata(state.trace)
    }

    timeout = if state.terms.until, do: max(round(state.terms.until - now()), 0), else: :infinity
    %{state | ask: ask, asked: Pool.request(state.cfg, ask, timeout), place: nil, ref: nil}
  end

  # Two sessions' functions of one name are two commands, as far as their durations and failures are concerned.
  defp command_name(%{source: nil} = prepared), do: prepared.subject
  defp command_name(prepared), do: "#{prepared.subject} #{String.slice(prepared.source, 0, 8)}"

  defp attempt(state, place) do
    ref = make_ref()
    attempt = if state.again?, do: state.attempt, else: state.attempt + 1
    remaining = if state.terms.until, do: max(state.terms.until - now(), 0)

    params =
      Request.params(state.prepared, state.session, %{
        deadline: remaining,
        attempt: attempt,
        traceparent: Trace.traceparent(state.trace),
        telemetry: Telemetry.params(state.cfg, state.session)
      })

    # That kernel may have forgotten the source as well, without its process knowing.
    if state.resent, do: Kernel.forget_source(place.pid, state.prepared.source)
    Kernel.request(place.pid, ref, state.prepared.method, params, state.prepared.buffers)
    if state.timer, do: Process.cancel_timer(state.timer)
    timer = if remaining, do: Process.send_after(self(), {:late, ref}, round(remaining) + @late_ms)
    chunks = state.chunks && Chunks.attempt(state.chunks)

    %{
      state
      | place: Map.put(place, :monitor, Process.monitor(place.pid)),
        ref: ref,
        asked: nil,
        attempt: attempt,
        again?: false,
        timer: timer,
        chunks: chunks,
        tried: System.monotonic_time(),
        staged: Staged.new(),
        journal: Journal.begin(state.journal)
    }
  end

  # -- what happens ---------------------------------------------------------------------------------

  @impl true
  def handle_cast({:join, caller, ref}, state) do
    {:noreply, put_in(state.waiters[ref], {caller, Process.monitor(caller)})}
  end

  def handle_cast({:leave, ref}, state), do: left(state, ref)

  def handle_cast(:consumed, state) do
    {chunks, credit} = Chunks.consumed(state.chunks)
    if credit > 0 and state.ref, do: Kernel.credit(state.place.pid, state.ref, credit)
    {:noreply, %{state | chunks: chunks}}
  end

  @impl true
  def handle_info({:bridge_kernel, ref, event}, %{ref: ref} = state), do: on_kernel(event, state)
  # Late words of a kernel that was given up.
  def handle_info({:bridge_kernel, _other, _event}, state), do: {:noreply, state}

  def handle_info({:late, ref}, %{ref: ref} = state) when ref != nil do
    Kernel.cancel(state.place.pid, ref)
    release(state, :deadline)
    error = Error.new(:deadline_exceeded, "the deadline passed, and the kernel did not say so")
    finish(%{state | place: nil, ref: nil}, {:error, error})
  end

  def handle_info({:late, _other}, state), do: {:noreply, state}

  def handle_info({:DOWN, monitor, :process, _pid, reason} = message, state) do
    case {Map.pop(state.tools, monitor), Enum.find(state.waiters, &match?({_, {_, ^monitor}}, &1))} do
      {{%{} = tool, tools}, _} ->
        {:noreply, tool_cut_short(%{state | tools: tools}, tool, Callbacks.crashed(tool.tool, reason))}

      {_, {ref, _waiter}} ->
        left(state, ref)

      {_, nil} ->
        if state.place != nil and state.place.monitor == monitor,
          do:
            on_kernel({:died, Error.new(:kernel_died, "kernel #{state.place.id} is gone: its process failed")}, state),
          else: granted(message, state)
    end
  end

  def handle_info({:tool_timeout, monitor}, state) do
    case Map.pop(state.tools, monitor) do
      {nil, _tools} ->
        {:noreply, state}

      {tool, tools} ->
        Process.demonitor(monitor, [:flush])
        Process.exit(tool.pid, :kill)
        {:noreply, tool_cut_short(%{state | tools: tools}, tool, Callbacks.timed_out(tool.tool))}
    end
  end

  def handle_info({:io_reply, _ref, _reply}, state), do: {:noreply, state}
  def handle_info({:EXIT, _pid, _reason}, state), do: {:noreply, state}

  # A tool's reply: the message of its task.
  def handle_info({monitor, {:tool, reply}}, state) when is_map_key(state.tools, monitor) do
    Process.demonitor(monitor, [:flush])
    {tool, tools} = Map.pop!(state.tools, monitor)
    {:noreply, tool_ended(%{state | tools: tools}, tool, reply)}
  end

  def handle_info(message, state), do: granted(message, state)

  defp granted(_message, %{asked: nil} = state), do: {:noreply, state}

  defp granted(message, state) do
    case Pool.checked_out(state.cfg, state.ask, message, state.asked) do
      :no_reply -> {:noreply, state}
      {:ok, place} -> {:noreply, attempt(state, place)}
      {:error, error} -> finish(%{state | asked: nil}, {:error, error}, how_refused(state, error))
    end
  end

  # A bridge that is being stopped has not ended its commands; nor is one at its end that has run, and gets no kernel.
  defp how_refused(_state, %Error{name: :host_closed}), do: :closing
  defp how_refused(state, _error), do: if(state.resumed? or state.died > 0, do: :lost, else: :ended)

  defp left(state, ref) do
    case Map.pop(state.waiters, ref) do
      {nil, _waiters} ->
        {:noreply, state}

      {{_pid, monitor}, waiters} ->
        Process.demonitor(monitor, [:flush])
        state = %{state | waiters: waiters}
        if waiters == %{}, do: cancelled(state), else: {:noreply, state}
    end
  end

  defp cancelled(state) do
    if state.ref do
      Kernel.cancel(state.place.pid, state.ref)
      release(state, :cancelled)
    end

    error = Error.new(:cancelled, "nobody waits for it any more")
    how = if state.ref, do: :ended, else: how_refused(state, error)
    finish(%{state | place: nil, ref: nil}, {:error, error}, how)
  end

  defp release(%{place: nil}, _outcome), do: :ok

  defp release(state, outcome) do
    Process.demonitor(state.place.monitor, [:flush])
    Pool.checkin(state.cfg, state.place.lease, outcome)
  end

  # -- what the kernel says ----------------------------------------------------------------------------

  defp on_kernel({:callback, callback, method, params, buffers}, state) do
    case Callbacks.serve(state, callback, method, params, buffers) do
      {:ok, state} -> {:noreply, state}
      {:diverged, state, error} -> give_up(state, error)
    end
  end

  defp on_kernel({:notification, "command.chunk", params, buffers}, %{chunks: %Chunks{} = chunks} = state) do
    case Chunks.take(chunks, params, buffers, &decode(state, &1, buffers, &2)) do
      {:ok, chunks, value} ->
        for {ref, _waiter} <- state.waiters, do: send(ref, {ref, {:chunk, value}})
        {:noreply, %{state | chunks: chunks}}

      {:again, chunks, credit} ->
        if credit > 0, do: Kernel.credit(state.place.pid, state.ref, credit)
        {:noreply, %{state | chunks: chunks}}

      {:error, error} ->
        give_up(state, error)
    end
  end

  defp on_kernel({:notification, _method, _params, _buffers}, state), do: {:noreply, state}

  defp on_kernel({:output, name, text}, state) do
    if state.cfg.on_output do
      told = %{name: name, text: text, session: state.session, command: state.id, kernel: state.place.id}
      hand_out(state.cfg.on_output, told)
    else
      # Not waited for: a group leader that hangs holds nothing up.
      send(state.leader, {:io_request, self(), make_ref(), {:put_chars, :unicode, text}})
    end

    {:noreply, state}
  end

  defp on_kernel({:display, content, update?}, state) do
    Bridge.Live.display(Bridge.Display.new(content, update: update?), state.leader)
    {:noreply, state}
  end

  # It was not sent: the kernel had died before. That says nothing about the command.
  defp on_kernel({:gone, _error}, state) do
    release(state, {:error, :kernel_died})
    {:noreply, acquire(%{state | again?: true, avoid: [state.place.id | state.avoid]})}
  end

  defp on_kernel({:answer, {:ok, result, buffers}}, state) do
    release(state, :ok)
    state = %{state | place: nil, ref: nil}

    with :ok <- Journal.check_complete(state.journal),
         :ok <- Chunks.check_complete(state.chunks),
         {:ok, value, changes} <- read(state, result, buffers),
         {:ok, _versions} <- commit(state, value, changes) do
      finish(state, {:ok, value})
    else
      {:error, error} -> finish(state, {:error, error})
    end
  end

  defp on_kernel({:answer, {:error, %Error{name: :source_missing}}}, %{resent: false} = state) do
    release(state, {:error, :source_missing})
    {:noreply, acquire(%{state | resent: true, again?: true})}
  end

  defp on_kernel({:answer, {:error, error}}, state) do
    release(state, {:error, error.name})
    # Told to a command that one of its tools sent.
    how = if error.name == :host_closed and closing?(state), do: :closing, else: :ended
    finish(%{state | place: nil, ref: nil}, {:error, in_our_words(error)}, how)
  end

  defp on_kernel({:died, error}, state) do
    release(state, :died)
    lost(state)
    state = %{state | died: state.died + 1, avoid: [state.place.id | state.avoid], place: nil, ref: nil}

    cond do
      state.died > @shared_attempts ->
        info = %{name: state.prepared.subject, session: state.session, kernels: state.died, last: error.message}
        finish(state, {:error, Pool.quarantine(state.cfg, Request.digest(state.prepared), info)}, :lost)

      state.died > state.terms.retries ->
        finish(state, {:error, error}, :lost)

      state.journal.overflowed and state.journal.effects ->
        message = "#{error.message}; the command called back too often to be repeated"
        finish(state, Error.error(:kernel_died, message, remedy: "Split it into several."), :lost)

      true ->
        measured = %{attempt: state.attempt + 1, recorded: Journal.count(state.journal)}
        told(state, [:bridge, :execution, :retry], measured, said(state))
        {:noreply, acquire(state)}
    end
  end

  defp closing?(state), do: not match?({:ok, %{closed: false}}, Pool.status(state.cfg))

  # Somebody's own function: what it raises is no reason to fail the command.
  defp hand_out(on_output, told) do
    on_output.(told)
  catch
    kind, reason ->
      trace = Bridge.Private.without_arguments(__STACKTRACE__)
      Logger.warning("on_output failed: " <> Exception.format(kind, reason, trace))
  end

  # What to do about these is this host's to say; a kernel says it as for the Python host.
  defp in_our_words(%Error{name: name, type: "bridge." <> _} = error)
       when name in [:deadline_exceeded, :policy_denied, :overloaded, :invalid_arguments] do
    %{error | remedy: Error.new(name).remedy}
  end

  defp in_our_words(error), do: error

  # The command cannot go on, whatever its code makes of it: its caller is told now.
  defp give_up(state, error) do
    Kernel.cancel(state.place.pid, state.ref)
    release(state, {:error, error.name})
    finish(%{state | place: nil, ref: nil}, {:error, error})
  end

  defp tool_ended(state, tool, reply) do
    if tool.timer, do: Process.cancel_timer(tool.timer)
    Callbacks.tool_ended(state, tool, reply)
  end

  defp tool_cut_short(state, tool, reply) do
    Callbacks.record(state, tool, reply)
    tool_ended(state, tool, reply)
  end

  # -- the result ----------------------------------------------------------------------------------------

  defp read(%{prepared: %{method: "instance.create"}} = state, %{"state" => %{} = kept} = result, buffers) do
    record = state.prepared.instance

    with {:ok, kept, nil} <- state_of(state, kept, [], buffers) do
      made = Map.merge(record, %{state: kept, version: 1, methods: strings(result["methods"])})
      ref = %Bridge.Ref{id: record.ref, class: record.class, version: 1, session: state.session, bridge: state.cfg.name}
      {:ok, ref, [{:instance, made, nil}]}
    end
  end

  defp read(%{prepared: %{method: "instance.create"}}, _result, _buffers), do: misfit("an instance has no state")

  defp read(%{prepared: %{method: "object.inspect"}}, result, _buffers) do
    case Bridge.Inspected.read(result) do
      {:ok, inspected} -> {:ok, inspected, []}
      :error -> misfit("that is no description")
    end
  end

  defp read(%{chunks: nil}, result, _buffers) when not is_map_key(result, "value"), do: misfit("it has no value")

  defp read(%{prepared: %{instance: %{} = record}} = state, result, buffers) do
    with {:ok, kept, value} <- state_of(state, result["state"], [{"result", result["value"]}], buffers) do
      changed = kept && %{record | state: kept, version: record.version + 1}
      {:ok, value, if(changed, do: [{:instance, changed, record.version}], else: [])}
    end
  end

  defp read(state, result, buffers) do
    with {:ok, value} <- decode(state, result["value"], buffers, "result"), do: {:ok, value, []}
  end

  defp misfit(why), do: Error.error(:internal_error, "the kernel's answer does not fit the contract: #{why}")

  defp strings(list) when is_list(list), do: Enum.filter(list, &is_binary/1)
  defp strings(_none), do: []

  defp state_of(state, nil, values, buffers) do
    with {:ok, values} <- Value.decode_many(values, buffers, hook: &hook(state, &1)), do: {:ok, nil, List.first(values)}
  end

  defp state_of(state, %{"adapter" => adapter} = kept, values, buffers) when is_binary(adapter) do
    # A ref within a state is the kernel's: it goes back as it came.
    with {:ok, digest} <- digest_of(kept),
         {:ok, [inner | values]} <-
           Value.decode_many([{"state", kept["value"]} | values], buffers, hook: &hook(state, &1)) do
      {:ok, %{adapter: adapter, value: inner, sha256: digest}, List.first(values)}
    end
  end

  defp state_of(_state, _other, _values, _buffers), do: misfit("its state has no adapter")

  defp digest_of(%{"sha256" => digest}) when is_binary(digest) or digest == nil, do: {:ok, digest}
  defp digest_of(kept) when not is_map_key(kept, "sha256"), do: {:ok, nil}
  defp digest_of(_kept), do: misfit("its state's sha256 is no text")

  defp decode(state, json, buffers, path), do: Value.decode(json, buffers, path: path, hook: &hook(state, &1))

  @doc false
  # What a ref that comes from a kernel becomes: one that knows whose it is.
  @spec hook(t(), struct()) :: struct()
  def hook(state, %Bridge.Ref{} = ref), do: %{ref | session: state.session, bridge: state.cfg.name}
  def hook(_state, other), do: other

  defp commit(state, value, changes) do
    ops = Staged.ops(state.staged) ++ changes

    result = if key = state.terms.key, do: %{key: key, digest: state.digest, value: value}

    if ops == [] and result == nil and not state.journal.effects do
      with :ok <- SessionStore.touch(state.cfg, state.session),
           :ok <- SessionStore.end_command(state.cfg, state.id, :ok),
           do: {:ok, %{}}
    else
      SessionStore.commit(state.cfg, state.id, state.session, ops, result)
    end
  end

  # -- its end ----------------------------------------------------------------------------------------------

  # `how`: `:lost` if it has run and no kernel has it, `:closing` if the bridge is being stopped, else `:ended`.
  defp finish(state, result, how \\ :ended) do
    if state.timer, do: Process.cancel_timer(state.timer)
    end_tools(state)
    result = with {:error, error} <- result, do: {:error, failed(state, error, how)}

    # Who has the result may look at once: it is told before.
    case result do
      {:ok, _value} -> tell(state, :stop, measured(state), %{})
      {:error, error} -> tell(state, :exception, measured(state), %{error: error.type})
    end

    answer_all(state, result)
    {:stop, :normal, state}
  end

  defp end_tools(state), do: for({_monitor, tool} <- state.tools, do: Process.exit(tool.pid, :shutdown))

  # Who comes with the key again must not pay twice: a command that was lost, or out of time, goes on then where it was.
  defp failed(state, error, how) do
    out_of_time = error.name == :deadline_exceeded and state.terms.until != nil and now() >= state.terms.until
    keyed? = state.terms.key != nil
    # What was to go on, and got no kernel, is there still.
    lost? = how == :lost and (keyed? or state.died == 0)
    keep? = how == :closing or lost? or (keyed? and out_of_time)
    if keep?, do: Callbacks.keep(state)

    with :ok <- SessionStore.end_command(state.cfg, state.id, {:error, error.name}, keep: keep?),
         # Who is told that it failed must not find it among the interrupted, with its effects done.
         true <- state.journal.effects and state.cfg.store != nil and not keep?,
         :ok <- Bridge.Store.Owner.call(state.cfg, :flush) do
      error
    else
      false -> error
      # The disk: told to whoever writes next. What ended this is what counts here.
      {:error, _store} -> error
    end
  end

  @impl true
  def terminate(:normal, _state), do: :ok

  # The bridge is being stopped, or the pool was started anew, and has not ended the command: it goes on another time. So
  # does one with a key of which this process failed.
  def terminate(reason, state) do
    stopping? = stopping?(reason)
    end_tools(state)

    if state.begun? do
      name = if stopping?, do: :host_closed, else: :internal_error
      keep? = stopping? or state.terms.key != nil
      if keep?, do: Callbacks.keep(state)
      # A store that cannot be written says so itself: the command is interrupted then, as it is in there.
      _ = SessionStore.end_command(state.cfg, state.id, {:error, name}, keep: keep?)
      tell(state, :exception, measured(state), %{error: Error.new(name).type})
    end

    if stopping?, do: answer_all(state, stopped()), else: :ok
  end

  # A crash report says nothing of what is in here.
  @impl {:format_status, 1} in GenServer.behaviour_info(:callbacks)
  def format_status(status), do: Bridge.Private.status(status, __MODULE__)

  # -- telling --------------------------------------------------------------------------------------------------

  defp measured(state), do: %{duration: System.monotonic_time() - state.began, attempts: state.attempt}

  defp said(state) do
    Map.merge(Trace.metadata(state.trace), %{
      command: state.prepared.method,
      subject: state.prepared.subject,
      session: state.session
    })
  end

  defp tell(state, last, measured, more) do
    told(
      state,
      [:bridge, :command, last],
      measured,
      state |> said() |> Map.put(:command_id, state.id) |> Map.merge(more)
    )
  end

  defp told(%{trace: %{sampled: true}} = state, name, measured, said),
    do: Telemetry.execute(state.cfg, name, measured, said)

  defp told(state, name, measured, said), do: Telemetry.count(state.cfg, name, measured, said)

  # The end of an attempt whose kernel cannot tell it itself.
  defp lost(state) do
    span = Trace.child_of(state.trace)

    said =
      Map.merge(said(state), Trace.metadata(span))
      |> Map.merge(%{kernel: state.place.id, attempt: state.attempt, success: false, error: "bridge.KernelDied"})

    told(state, [:bridge, :execution, :exception], %{duration: System.monotonic_time() - state.tried}, said)
  end

  defp now, do: System.monotonic_time(:millisecond)
end
