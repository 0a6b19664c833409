defmodule Bridge.Command do
  @moduledoc false
  # One command, in a process of its own for as long as it runs: its place in a kernel, its attempts, its callbacks, its
  # commit. Whoever asked for it is monitored: when nobody waits any more it is cancelled, in the kernel too.

  use GenServer, restart: :temporary

  alias Bridge.{Callbacks, Config, Error, Journal, Kernel, Pool, Request, SessionStore, Telemetry, Value}
  alias Bridge.Command.{Answer, Chunks, Terms}
  alias Bridge.Store.Staged
  alias Bridge.Telemetry.Trace

  require Logger

  # From the next attempt on it runs alone: if that kernel dies too, it is proven who did it.
  @shared_attempts 2
  # How long a tool that traps exits may take to end.
  @tool_exit_ms 5_000

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
                :journal,
                begun?: false,
                resumed?: false,
                ended?: false,
                waiters: %{},
                attempt: 0,
                died: 0,
                avoid: [],
                resent: false,
                again?: false,
                tools: %{},
                tools_due: :queue.new(),
                staged: nil
              ]

  @type t :: %__MODULE__{}

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
      journal: Journal.new([], prepared.secret?),
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
         :ok <- Terms.check_same(state.terms.key, command.digest, state.digest) do
      goes_on(state, command, %{}, [])
    else
      :error ->
        {:ok, state}

      {:ok, %{digest: known, value: value}} ->
        with :ok <- Terms.check_same(state.terms.key, known, state.digest), do: {:done, {:ok, value}}

      {:error, error} ->
        {:error, error}
    end
  end

  defp before(state, {replies, rerun}) do
    with {:ok, command} <- Bridge.Recovery.find(state.cfg, state.id), do: goes_on(state, command, replies, rerun)
  end

  defp goes_on(state, command, replies, rerun) do
    with {:ok, entries} <- Bridge.Recovery.entries(state.cfg, command, replies, rerun) do
      {:ok,
       %{
         state
         | id: command.id,
           journal: Journal.new(entries, state.prepared.secret?),
           attempt: command.attempt,
           resumed?: true
       }}
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

    timeout = if left = Terms.left(state.terms), do: round(left), else: :infinity
    %{state | ask: ask, asked: Pool.request(state.cfg, ask, timeout), place: nil, ref: nil}
  end

  # Two sessions' functions of one name are two commands, as far as their durations and failures are concerned.
  defp command_name(%{source: nil} = prepared), do: prepared.subject
  defp command_name(prepared), do: "#{prepared.subject} #{String.slice(prepared.source, 0, 8)}"

  defp attempt(state, place) do
    ref = make_ref()
    attempt = if state.again?, do: state.attempt, else: state.attempt + 1
    # A session that is deleted meanwhile is noticed at the end.
    if attempt > 1, do: SessionStore.tried(state.cfg, state.id, attempt)
    remaining = Terms.left(state.terms)

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
    timer = if remaining, do: Process.send_after(self(), {:late, ref}, Terms.patience(state.terms))
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
  def handle_cast({:join, caller, ref, depth}, state) do
    state = put_in(state.waiters[ref], {caller, Process.monitor(caller)})
    # The place that it waits for may be that of a command whose tool waits for it now.
    if depth > 0 and state.asked != nil, do: Pool.hurry(state.cfg)
    {:noreply, put_in(state.terms.depth, max(state.terms.depth, depth))}
  end

  # There is nothing to cancel any more.
  def handle_cast(_message, %{ended?: true} = state), do: {:noreply, state}

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
        state = tool_cut_short(%{state | tools: tools}, tool, Callbacks.crashed(tool.tool, reason))
        unless_done(state)

      {_, {ref, _waiter}} when not state.ended? ->
        left(state, ref)

      {_, _none} ->
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
        unless_done(tool_cut_short(%{state | tools: tools}, tool, Callbacks.timed_out(tool.tool)))
    end
  end

  def handle_info({:io_reply, _ref, _reply}, state), do: {:noreply, state}
  def handle_info({:EXIT, _pid, _reason}, state), do: {:noreply, state}

  # A tool's reply: the message of its task.
  def handle_info({monitor, {:tool, reply}}, state) when is_map_key(state.tools, monitor) do
    Process.demonitor(monitor, [:flush])
    {tool, tools} = Map.pop!(state.tools, monitor)
    unless_done(tool_ended(%{state | tools: tools}, tool, reply))
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
    decode = &Value.decode(&1, buffers, path: &2, hook: Answer.hook(state))

    case Chunks.take(chunks, params, buffers, decode) do
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
         :ok <- Chunks.check_complete(state.chunks, result),
         {:ok, value, changes} <- Answer.read(state.prepared, result, buffers, state),
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

  # What a kernel tells users of the Python host to do.
  @for_python ["jupyter bridge", "repr(session)", "Host(", "session."]

  defp in_our_words(%Error{type: "bridge." <> _} = error) do
    if String.contains?(error.remedy, @for_python), do: %{error | remedy: Error.new(error.name).remedy}, else: error
  end

  defp in_our_words(%Error{message: "No LM is loaded" <> _} = error) do
    %{error | remedy: "Give the session one: Bridge.lm(session, model, api_key: …)."}
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
    if state.ended?, do: Callbacks.record_late(state, tool, reply)
    Callbacks.tool_ended(state, tool, reply)
  end

  # A command that has ended is there as long as a tool of it runs.
  defp unless_done(%{ended?: true, tools: tools} = state) when map_size(tools) == 0, do: {:stop, :normal, state}
  defp unless_done(state), do: {:noreply, state}

  defp tool_cut_short(state, tool, reply) do
    Callbacks.record(state, tool, reply)
    tool_ended(state, tool, reply)
  end

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
    # Who comes with its key goes on where it was. What a tool does meanwhile has happened then: it is not cut short.
    lingers? = how == :lost and state.terms.key != nil and map_size(state.tools) > 0
    state = if lingers?, do: Callbacks.forget_due(state), else: state
    unless lingers?, do: end_tools(state)
    result = with {:error, error} <- result, do: {:error, failed(state, error, how)}

    # Who has the result may look at once: it is told before.
    case result do
      {:ok, _value} -> tell(state, :stop, measured(state), %{})
      {:error, error} -> tell(state, :exception, measured(state), %{error: error.type})
    end

    answer_all(state, result)
    if lingers?, do: {:noreply, %{state | ended?: true, waiters: %{}, timer: nil}}, else: {:stop, :normal, state}
  end

  # Not waited for here: whoever asked is to be told now.
  defp end_tools(%{tools: tools}) when map_size(tools) == 0, do: :ok

  defp end_tools(state) do
    pids = for {_monitor, tool} <- state.tools, do: tool.pid
    Enum.each(pids, &Process.exit(&1, :shutdown))
    # A bridge that is being stopped ends them itself.
    _ = Task.Supervisor.start_child(Config.process(state.cfg.name, :tool_tasks), fn -> end_surely(pids) end)
    :ok
  catch
    :exit, _no_supervisor -> :ok
  end

  # Also one that traps exits.
  defp end_surely(pids) do
    left = Map.new(pids, &{Process.monitor(&1), &1})
    timer = Process.send_after(self(), :late, @tool_exit_ms)
    end_surely(left, timer)
  end

  defp end_surely(left, timer) when map_size(left) == 0, do: Process.cancel_timer(timer)

  defp end_surely(left, timer) do
    receive do
      {:DOWN, monitor, :process, _pid, _reason} -> end_surely(Map.delete(left, monitor), timer)
      :late -> for {_monitor, pid} <- left, do: Process.exit(pid, :kill)
    end
  end

  # Who comes with the key again must not pay twice: a command that was lost, or out of time, goes on then where it was.
  defp failed(state, error, how) do
    out_of_time = error.name == :deadline_exceeded and Terms.out_of_time?(state.terms)
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

    if state.begun? and not state.ended? do
      name = if stopping?, do: :host_closed, else: :internal_error
      keep? = stopping? or state.terms.key != nil
      if keep?, do: Callbacks.keep(state)
      # A store that cannot be written says so itself: the command is interrupted then, as it is in there.
      _ = SessionStore.end_command(state.cfg, state.id, {:error, name}, keep: keep?)
      tell(state, :exception, measured(state), %{error: Error.new(name).type})
    end

    if stopping? and not state.ended?, do: answer_all(state, {:error, stopped()}), else: :ok
  end

  @doc "Whether a command's process ended for such a reason because its bridge was stopped."
  @spec stopping?(term()) :: boolean()
  def stopping?(reason), do: reason == :shutdown or match?({:shutdown, _}, reason)

  @doc "What its caller is told then."
  @spec stopped() :: Error.t()
  def stopped, do: Error.new(:host_closed, "Bridge was stopped while the command ran")

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
end
