defmodule Bridge.Store.Owner do
  @moduledoc false
  # The process that owns a bridge's store: whatever changes goes through it, in order. It checks, records the facts in
  # memory, and hands them to the disk (`Bridge.Store.Disk`), which answers the caller once they are there. So many
  # callers share one sync, and nobody waits for another's.

  use GenServer

  alias Bridge.Error
  alias Bridge.Store.{Commit, Disk, Facts, Plain, Tables, Vault}

  @sweep_ms 60_000
  @quota %{things: 100_000, bytes: 1_073_741_824, history: 100, sessions: 1_000_000}
  @key_ms 24 * 60 * 60 * 1000

  @type reply :: term()

  # -- its life --------------------------------------------------------------------------------------------------------

  @spec start_link(struct(), keyword()) :: GenServer.on_start()
  def start_link(cfg, opts) do
    GenServer.start_link(__MODULE__, {cfg, opts}, name: Bridge.Config.process(cfg.name, :store))
  end

  @doc "The image of that bridge's store; `:host_closed` if it is not running."
  @spec tables(struct()) :: {:ok, Tables.t()} | {:error, Error.t()}
  def tables(cfg) do
    case :persistent_term.get({__MODULE__, cfg.name}, nil) do
      nil -> closed(cfg)
      tables -> {:ok, tables}
    end
  end

  @doc "The same, raised."
  @spec tables!(struct()) :: Tables.t()
  def tables!(cfg) do
    case tables(cfg) do
      {:ok, tables} -> tables
      {:error, error} -> raise error
    end
  end

  @doc "That it is not running."
  @spec closed(struct()) :: {:error, Error.t()}
  def closed(cfg), do: Error.error(:host_closed, "the store of #{inspect(cfg.name)} is not running")

  @doc "Asks the owner; `:host_closed` if it is not running, or dies of it."
  @spec call(struct(), term()) :: reply()
  def call(cfg, request) do
    GenServer.call(Bridge.Config.process(cfg.name, :store), request, :infinity)
  catch
    # Whatever it died of, it has said so itself.
    :exit, {_reason, {GenServer, :call, _request}} -> closed(cfg)
  end

  @doc "How long the result of an idempotency key is kept."
  @spec key_ms() :: pos_integer()
  def key_ms, do: @key_ms

  @doc "What `seal/3` sealed for that command; what was not sealed is as it is."
  @spec unseal(Vault.t(), term(), String.t()) :: {:ok, term()} | {:error, Error.t()}
  def unseal(vault, {:sealed, bytes}, command) do
    with {:ok, clear} <- Vault.unseal(vault, bytes, command, "what is kept of command #{command}") do
      # Authenticated: it is what was sealed here.
      {:ok, :erlang.binary_to_term(clear)}
    end
  end

  def unseal(_vault, term, _command), do: {:ok, term}

  @impl true
  def init({cfg, opts}) do
    Process.flag(:trap_exit, true)
    clock = Keyword.get(opts, :clock, &Tables.system_time/0)

    given = for {kind, limit} <- cfg.quota || %{}, limit != nil, into: %{}, do: {kind, limit}
    quota = Map.merge(@quota, given)
    tables = Tables.new(clock: clock, versions: quota.history, quota: quota)

    with {:ok, disk} <- Disk.open(cfg.store, tables, opts) do
      :persistent_term.put({__MODULE__, cfg.name}, tables)

      state = %{
        cfg: cfg,
        tables: tables,
        quota: quota,
        clock: clock,
        disk: disk,
        vault: Vault.new(cfg.store),
        busy: %{},
        watchers: %{},
        timer: nil,
        sweep_at: nil
      }

      {:ok, interrupt(state) |> schedule()}
    else
      {:error, error} -> {:stop, {:shutdown, error}}
    end
  end

  # What was running when the store was closed, however that came, is interrupted.
  defp interrupt(state) do
    facts = for %{status: :running, id: id} <- Tables.commands(state.tables), do: {:kept, id, nil}
    Tables.apply(state.tables, facts)
    state
  end

  @impl true
  def terminate(_reason, state) do
    for %{ttl: ttl} = session when ttl != nil <- Tables.sessions(state.tables) do
      Disk.append(state.disk, [{:session, session.id, Map.take(session, [:created, :used, :ttl, :version, :lm])}])
    end

    :persistent_term.erase({__MODULE__, state.cfg.name})
    Disk.close(state.disk)
  end

  # A crash report says nothing of what is in here: there are other people's values.
  @impl {:format_status, 1} in GenServer.behaviour_info(:callbacks)
  def format_status(status), do: Bridge.Private.status(status, __MODULE__)

  # -- requests --------------------------------------------------------------------------------------------------------

  @impl true
  def handle_call(request, from, state) do
    case Disk.failure(state.disk) do
      nil -> handle(request, from, state)
      error -> {:reply, {:error, error}, state}
    end
  end

  defp handle({:create, id, ttl}, from, state) do
    state = expire(state, id)

    case Tables.session(state.tables, id) do
      :error ->
        with :ok <- check_room(state) do
          facts = [made(state, id, ttl)]
          record(state, facts, {:ok, id}, from) |> after_made(id)
        else
          {:error, error} -> {:reply, {:error, error}, state}
        end

      {:ok, session} when ttl != :default and ttl != session.ttl ->
        put = %{created: session.created, used: state.clock.(), ttl: ttl, version: session.version, lm: session.lm}
        record(schedule(state, ttl), [{:session, id, put}], {:ok, id}, from)

      {:ok, _session} ->
        Tables.touch(state.tables, id)
        {:reply, {:ok, id}, state}
    end
  end

  defp handle({:delete_session, id}, from, state) do
    case Tables.session(state.tables, id) do
      {:ok, _session} ->
        result = record(state, [{:session_gone, id}], :ok, from)
        tell(state, :gone, id)
        result

      _none ->
        {:error, error} = Commit.session(state.tables, id)
        {:reply, {:error, error}, expire(state, id)}
    end
  end

  # `make` opens the session if it is not there: what a person writes makes it, what a command writes does not.
  defp handle({:commit, command, id, ops, result, make}, from, state) do
    {state, opening} = if make, do: open(state, id), else: {state, :ok}

    with :ok <- opening,
         {:ok, begun} <- running(state, command),
         {:ok, facts, told} <- Commit.plan(state.tables, state.quota, id, ops, state.clock.()),
         {:ok, kept} <- kept_result(state, id, begun, result) do
      ended = if begun == nil, do: [], else: [{:ended, begun.id, :ok, state.clock.()}]
      record(state, facts ++ kept ++ ended, {:ok, told}, from)
    else
      {:error, error} -> {:reply, {:error, error}, state}
    end
  end

  # What is about one thing that a session owns and is no variable: made by a function of the image, in order.
  defp handle({:change, id, make, change}, from, state) do
    {state, opening} = if make, do: open(state, id), else: {state, :ok}

    with :ok <- opening,
         {:ok, session} <- Commit.session(state.tables, id),
         {:ok, facts, reply} <-
           change.(%{
             tables: state.tables,
             id: id,
             session: session,
             quota: state.quota,
             vault: state.vault,
             now: state.clock.()
           }) do
      record(state, facts, reply, from)
    else
      {:error, error} -> {:reply, {:error, error}, state}
    end
  end

  defp handle({:begin, command}, from, state) do
    {state, opening} = open(state, command.session)

    with :ok <- opening do
      case Tables.command(state.tables, command.id) do
        {:ok, _known} ->
          record_soon(state, [{:tried, command.id, command.attempt}], :ok, from)

        :error ->
          with {:ok, params} <- seal(state, command, command.params) do
            record_soon(state, [{:begun, %{command | params: params}}], :ok, from)
          else
            {:error, error} -> {:reply, {:error, error}, state}
          end
      end
    else
      {:error, error} -> {:reply, {:error, error}, state}
    end
  end

  defp handle({:tried, id, attempt}, from, state) do
    case running(state, id) do
      {:ok, _command} -> record_soon(state, [{:tried, id, attempt}], :ok, from)
      {:error, error} -> {:reply, {:error, error}, state}
    end
  end

  defp handle({:called, id, n, call, sync}, from, state) do
    with {:ok, command} <- running(state, id),
         {:ok, asked} <- seal(state, command, Map.get(call, :asked)) do
      facts = [{:called, id, n, Map.put(call, :asked, asked)}]
      if sync, do: record(state, facts, :ok, from), else: record_soon(state, facts, :ok, from)
    else
      {:error, error} -> {:reply, {:error, error}, state}
    end
  end

  defp handle({:answered, id, n, reply}, from, state) do
    # A tool may answer after its command was given up: that is no mistake, and nobody hears it.
    with {:ok, command} <- Tables.command(state.tables, id),
         {:ok, reply} <- seal(state, command, reply) do
      record_soon(state, [{:answered, id, n, reply}], :ok, from)
    else
      :error -> {:reply, :ok, state}
      {:error, error} -> {:reply, {:error, error}, state}
    end
  end

  defp handle({:calls_gone, id, numbers}, from, state), do: record_soon(state, [{:calls_gone, id, numbers}], :ok, from)

  defp handle({:end, id, outcome, keep}, from, state) do
    case {Tables.command(state.tables, id), outcome} do
      {:error, _outcome} -> {:reply, :ok, state}
      {{:ok, _command}, {:error, name}} when keep -> record_soon(state, [{:kept, id, name}], :ok, from)
      {{:ok, _command}, outcome} -> record_soon(state, [{:ended, id, outcome, state.clock.()}], :ok, from)
    end
  end

  defp handle({:drop, id}, from, state) do
    case Tables.command(state.tables, id) do
      # Not one that somebody goes on with since it was looked up.
      {:ok, %{status: :interrupted}} -> record(state, [{:forgotten, id}], :ok, from)
      _other -> {:reply, Error.error(:not_found, "there is no interrupted command #{inspect(id)}"), state}
    end
  end

  defp handle({:take, sessions}, from, state) do
    with :ok <- check_facts(sessions), :ok <- check_new(state, sessions), :ok <- check_room(state, length(sessions)) do
      # A batch for each session: memory has what the log has, whole sessions.
      {last, before} = List.pop_at(sessions, -1)

      for {id, facts} <- before do
        Tables.apply(state.tables, facts)
        Disk.append(state.disk, facts)
        tell(state, :made, id)
      end

      case last do
        nil ->
          {:reply, {:ok, []}, state}

        {id, facts} ->
          Tables.apply(state.tables, facts)
          tell(state, :made, id)
          reply = {:ok, Enum.map(sessions, &elem(&1, 0))}
          persist(schedule(state), facts, reply, from)
      end
    else
      {:error, error} -> {:reply, {:error, error}, state}
    end
  end

  defp handle({:busy, id, pid}, _from, state) do
    case Tables.touch(state.tables, id) do
      :ok ->
        Tables.busy(state.tables, id, 1)
        {monitor, sessions} = Map.get_lazy(state.busy, pid, fn -> {Process.monitor(pid), %{}} end)
        sessions = Map.update(sessions, id, 1, &(&1 + 1))
        {:reply, :ok, put_in(state.busy[pid], {monitor, sessions})}

      _gone ->
        {:error, error} = Commit.session(state.tables, id)
        {:reply, {:error, error}, state}
    end
  end

  defp handle({:watch, pid}, _from, state) do
    watchers = Map.put_new_lazy(state.watchers, pid, fn -> Process.monitor(pid) end)
    {:reply, :ok, %{state | watchers: watchers}}
  end

  # Read where nothing changes meanwhile: for a reader whom writers never leave a quiet moment.
  defp handle({:read, read}, _from, state), do: {:reply, read.(state.tables), state}

  # `unseal` gets the vault here, for its key is in this process.
  defp handle({:with_vault, use}, _from, state), do: {:reply, use.(state.vault, state.tables), state}

  defp handle(:sweep, _from, state) do
    {gone, state} = sweep(state)
    {:reply, gone, state}
  end

  defp handle(:flush, from, state), do: record(state, [], :ok, from)

  # -- messages --------------------------------------------------------------------------------------------------------

  @impl true
  def handle_info(:sweep, state) do
    {_gone, state} = if Disk.failure(state.disk), do: {[], state}, else: sweep(state)
    {:noreply, state}
  end

  def handle_info({:DOWN, monitor, :process, pid, _reason}, state) do
    case state do
      %{busy: %{^pid => {^monitor, sessions}}} ->
        for {id, count} <- sessions, do: Tables.busy(state.tables, id, -count)
        {:noreply, %{state | busy: Map.delete(state.busy, pid)}}

      %{watchers: %{^pid => ^monitor}} ->
        {:noreply, %{state | watchers: Map.delete(state.watchers, pid)}}

      _state ->
        {:noreply, state}
    end
  end

  def handle_info({:EXIT, pid, reason}, state) do
    if Disk.process(state.disk) == pid, do: {:stop, {:shutdown, reason}, state}, else: {:noreply, state}
  end

  # -- recording -------------------------------------------------------------------------------------------------------

  # The caller is answered when it is on disk.
  defp record(state, facts, reply, from) do
    case Facts.check(facts) do
      :ok ->
        Tables.apply(state.tables, facts)
        persist(state, facts, reply, from)

      {:error, reason} ->
        {:reply, unfit(reason), state}
    end
  end

  defp persist(%{disk: nil} = state, _facts, reply, _from), do: {:reply, reply, state}

  defp persist(state, facts, reply, from) do
    Disk.append(state.disk, facts, {from, reply})
    {:noreply, state}
  end

  # The caller is answered at once, unless the disk is far behind.
  defp record_soon(state, facts, reply, from) do
    case if(Disk.behind?(state.disk), do: :behind, else: Facts.check(facts)) do
      :behind ->
        record(state, facts, reply, from)

      :ok ->
        Tables.apply(state.tables, facts)
        Disk.append(state.disk, facts)
        {:reply, reply, state}

      {:error, reason} ->
        {:reply, unfit(reason), state}
    end
  end

  defp unfit(reason), do: Error.error(:internal_error, "this could not be read again, and is not kept: #{reason}")

  defp running(_state, nil), do: {:ok, nil}

  defp running(state, id) do
    case Tables.command(state.tables, id) do
      {:ok, %{status: :running} = command} ->
        {:ok, command}

      _other ->
        Error.error(:not_found, "command #{inspect(id)} does not run: it has ended, or its session is gone",
          remedy: "Nothing of it was kept."
        )
    end
  end

  defp kept_result(_state, _id, _begun, nil), do: {:ok, []}

  defp kept_result(state, id, begun, %{key: key, digest: digest, value: value}) do
    command = begun || %{sealed: false, id: nil, method: nil}

    with {:ok, sealed} <- seal(state, command, value),
         {:ok, session} <- Commit.session(state.tables, id),
         growth = %{more: 0, new: 0, bytes: :erlang.external_size(sealed)},
         :ok <- Commit.check_quota(state.quota, session, growth) do
      result = %{digest: digest, value: sealed, command: command.id, ended: state.clock.()}
      {:ok, [{:result, id, key, result}]}
    end
  end

  defp seal(state, %{sealed: true} = command, term) do
    with {:ok, bytes} <- Vault.seal(state.vault, :erlang.term_to_binary(term), command.id) do
      {:ok, {:sealed, bytes}}
    end
  end

  defp seal(_state, _command, term), do: {:ok, term}

  # -- sessions --------------------------------------------------------------------------------------------------------

  defp made(state, id, ttl) do
    now = state.clock.()
    ttl = if ttl == :default, do: state.cfg.ttl, else: ttl
    {:session, id, %{created: now, used: now, ttl: ttl, version: 0, lm: nil}}
  end

  defp after_made(result, id) do
    state = elem(result, tuple_size(result) - 1)
    {:ok, session} = with {:expired, session} <- Tables.session(state.tables, id), do: {:ok, session}
    tell(state, :made, id)
    put_elem(result, tuple_size(result) - 1, schedule(state, session.ttl))
  end

  # Made on the way, in a batch of its own before the one that needs it.
  defp open(state, id) do
    state = expire(state, id)

    with :error <- Tables.touch(state.tables, id),
         :ok <- Plain.check_name("session", id),
         :ok <- check_room(state) do
      fact = made(state, id, :default)
      Tables.apply(state.tables, [fact])
      Disk.append(state.disk, [fact])
      tell(state, :made, id)
      {schedule(state, state.cfg.ttl), :ok}
    else
      :ok -> {state, :ok}
      {:error, error} -> {state, {:error, error}}
    end
  end

  defp expire(state, id) do
    with {:expired, _session} <- Tables.session(state.tables, id), do: forget(state, id)
    state
  end

  defp forget(state, id) do
    Tables.apply(state.tables, [{:session_gone, id}])
    Disk.append(state.disk, [{:session_gone, id}])
    tell(state, :gone, id)
  end

  defp tell(state, what, id) do
    # When it was, in the order of this node: what was made since is another session's of that name.
    at = System.unique_integer([:monotonic])
    for {pid, _monitor} <- state.watchers, do: send(pid, {:bridge_session, what, id, at})
    :ok
  end

  defp check_room(state, more \\ 1) do
    count = Tables.session_count(state.tables)

    if count + more > state.quota.sessions do
      Error.error(:quota_exceeded, "the host has #{count} sessions, as many as it may",
        remedy: "Delete some, or give them a time to live."
      )
    else
      :ok
    end
  end

  defp check_facts(sessions) do
    Enum.find_value(sessions, :ok, fn {_id, facts} ->
      with {:error, reason} <- Facts.check(facts), do: unfit(reason), else: (:ok -> nil)
    end)
  end

  defp check_new(state, sessions) do
    Enum.find_value(sessions, :ok, fn {id, _facts} ->
      case Tables.session(state.tables, id) do
        {:ok, _session} ->
          Error.error(:conflict, "there is a session #{inspect(id)} already", remedy: "Delete it first.")

        {:expired, _session} ->
          forget(state, id)
          nil

        :error ->
          nil
      end
    end)
  end

  # -- what has had its time -------------------------------------------------------------------------------------------

  defp sweep(state) do
    gone =
      for session <- Tables.sessions(state.tables), Tables.expired?(session, state.clock) do
        forget(state, session.id)
        session.id
      end

    now = state.clock.()

    for session <- Tables.sessions(state.tables),
        facts =
          for(
            {key, %{ended: ended}} <- Tables.all(state.tables, :result, session.id),
            ended + @key_ms <= now,
            do: {:result_gone, session.id, key}
          ),
        facts != [] do
      Tables.apply(state.tables, facts)
      Disk.append(state.disk, facts)
    end

    {gone, schedule(state)}
  end

  defp schedule(state) do
    now = state.clock.()
    ends = for %{ttl: ttl, used: used} when ttl != nil <- Tables.sessions(state.tables), do: used + ttl
    plan(%{state | sweep_at: nil}, min(Enum.min([now + @sweep_ms | ends]), now + @sweep_ms))
  end

  # A session that lives so long: is the next sweep late for it?
  defp schedule(state, nil), do: state
  defp schedule(state, ttl), do: plan(state, state.clock.() + ttl)

  defp plan(%{sweep_at: planned} = state, at) when planned != nil and planned <= at, do: state

  defp plan(state, at) do
    if state.timer, do: Process.cancel_timer(state.timer)
    # Not more often than each second: who reads sees that a session has expired, be it swept or not.
    wait = max(at - state.clock.(), 1_000)
    %{state | timer: Process.send_after(self(), :sweep, wait), sweep_at: at}
  end
end
