defmodule Bridge.Store.Tables do
  @moduledoc false
  # One image of a store, in ETS: what facts make of it (`apply/2`), and how it is read. Whoever made it is the only one
  # that writes; anybody reads. Facts are what the log keeps:
  #
  #     {:session, id, %{created, used, ttl, version, lm}}              made, or its own record changed
  #     {:session_gone, id}                                             with all it owns; alone in its batch
  #     {:variable, session, name, put}                                 one version; see `t:put/0`
  #     {:type, session, name, schema | nil}
  #     {:instance, session, record} {:instance_gone, session, ref}
  #     {:function, session, map} {:function_gone, session, name}
  #     {:secret, session, name, sealed} {:secret_gone, session, name}
  #     {:result, session, key, map} {:result_gone, session, key}       of a command with an idempotency key
  #     {:begun, command} {:tried, id, attempt} {:kept, id, error}      the journal
  #     {:called, id, n, call} {:answered, id, n, reply} {:calls_gone, id, [n]}
  #     {:ended, id, outcome, at} {:remembered, command} {:forgotten, id}

  require Record

  # `seq` grows with every change of the session: a reader that finds it unchanged has seen one moment. `live` holds
  # what readers write too, when it was used (1), and how many commands run (2): a session at work does not expire.
  Record.defrecordp(:session_row, :session, [
    :key,
    :version,
    :seq,
    :created,
    :ttl,
    :lm,
    :things,
    :bytes,
    :deleted,
    :live
  ])

  Record.defrecordp(:variable, [
    :key,
    :there,
    :version,
    :value,
    :type,
    :size,
    :at,
    :written,
    :restores,
    :kept,
    :kept_bytes
  ])

  alias Bridge.Error
  alias Bridge.Store.Facts

  @enforce_keys [:main, :history, :commands, :calls, :ended, :clear, :clock, :versions, :quota]
  defstruct @enforce_keys

  @type t :: %__MODULE__{}
  @type put :: %{
          there: boolean(),
          version: pos_integer(),
          value: term(),
          type: String.t() | nil,
          size: non_neg_integer(),
          at: non_neg_integer(),
          written: integer(),
          restores: pos_integer() | nil
        }
  @type fact :: tuple()

  @kept_versions 100
  @kept_bytes 16 * 1024 * 1024
  @kept_commands 10_000
  @used 1
  @busy 2

  @doc "An empty image. `versions`: how many of a variable are kept; `clock` gives milliseconds since the epoch."
  @spec new(keyword()) :: t()
  def new(opts \\ []) do
    make = fn name, kind -> :ets.new(name, [kind, :protected, keypos: 2, read_concurrency: true]) end

    %__MODULE__{
      main: make.(:bridge_store, :ordered_set),
      history: make.(:bridge_store_history, :ordered_set),
      commands: make.(:bridge_store_commands, :set),
      calls: make.(:bridge_store_calls, :ordered_set),
      ended: make.(:bridge_store_ended, :ordered_set),
      clear: make.(:bridge_store_clear, :set),
      clock: Keyword.get(opts, :clock, &__MODULE__.system_time/0),
      versions: Keyword.get(opts, :versions, @kept_versions),
      quota: Keyword.get(opts, :quota)
    }
  end

  @doc false
  @spec system_time() :: integer()
  def system_time, do: System.system_time(:millisecond)

  @spec delete(t()) :: :ok
  def delete(%__MODULE__{} = t) do
    for table <- [t.main, t.history, t.commands, t.calls, t.ended, t.clear], do: :ets.delete(table)
    :ok
  end

  # -- facts -----------------------------------------------------------------------------------------------------------

  @doc "Makes the image what the facts say. Readers see all of a session's part of them at once, or nothing."
  @spec apply(t(), [fact()]) :: :ok
  def apply(%__MODULE__{} = t, facts) do
    {gone, rows} =
      facts |> Enum.reduce(%{}, &stage(t, &1, &2)) |> Map.values() |> Enum.split_with(&match?({:gone, _key}, &1))

    # One insertion is what makes it one moment; so what goes is inserted as gone first.
    :ets.insert(t.main, gone ++ rows)
    for {:gone, key} <- gone, do: :ets.delete(t.main, key)
    :ok
  end

  @doc "As `apply/2`, of what was read from a file: `{:error, reason}` if these are no facts, or could not follow those before."
  @spec load(t(), term()) :: :ok | {:error, String.t()}
  def load(%__MODULE__{} = t, facts) do
    with :ok <- Facts.check(facts), :ok <- Facts.sound(facts), do: __MODULE__.apply(t, facts)
  rescue
    error in Error -> {:error, error.message}
  end

  defp misplaced!(reason), do: raise(Error.new(:store_damaged, reason))

  defp stage(t, {:session, id, %{} = put}, staged) do
    row =
      case find(t, staged, {:session, id}) do
        nil ->
          live = :atomics.new(2, signed: true)
          session_row(key: {:session, id}, version: 0, seq: 0, things: 0, bytes: 0, deleted: 0, live: live)

        known ->
          known
      end

    :atomics.put(session_row(row, :live), @used, put.used)
    row = session_row(row, version: put.version, created: put.created, ttl: put.ttl, lm: put.lm)
    Map.put(staged, {:session, id}, session_row(row, seq: session_row(row, :seq) + 1))
  end

  defp stage(t, {:session_gone, id}, staged) do
    # It is gone for readers at once; the rest follows.
    :ets.delete(t.main, {:session, id})

    for kind <- [:variable, :type, :instance, :function, :secret, :result] do
      for key <- :ets.select(t.main, [{match_key({kind, id, :_}), [], [{:element, 2, :"$_"}]}]) do
        :ets.delete(t.main, key)
      end
    end

    :ets.match_delete(t.history, {:put, {id, :_, :_}, :_})
    for command <- commands_of(t, id), do: forget_command(t, command.id)
    :ets.match_delete(t.ended, {:ended, :_, %{session: id}})
    :ets.delete(t.clear, id)
    staged
  end

  defp stage(t, {:variable, id, name, put}, staged) do
    key = {:variable, id, name}
    known = find(t, staged, key)

    if known != nil and put.version <= variable(known, :version),
      do: misplaced!("version #{put.version} of a variable comes after version #{variable(known, :version)}")

    {kept, kept_bytes} = if known == nil, do: {0, 0}, else: keep(t, id, name, known)
    was_there = known != nil and variable(known, :there)

    row =
      variable(
        key: key,
        there: put.there,
        version: put.version,
        value: put.value,
        type: put.type,
        size: put.size,
        at: put.at,
        written: put.written,
        restores: put.restores,
        kept: kept,
        kept_bytes: kept_bytes
      )

    staged
    |> Map.put(key, row)
    |> count(t, id,
      things: count_of(put.there) - count_of(was_there),
      bytes: size_of(put.there, put.size) - size_of(was_there, known && variable(known, :size)),
      deleted: count_of(not put.there) - count_of(known != nil and not was_there)
    )
  end

  defp stage(t, {:type, id, name, nil}, staged), do: drop(t, staged, id, {:type, id, name}, [])

  defp stage(t, {:type, id, name, schema}, staged) do
    staged |> Map.put({:type, id, name}, {:type, {:type, id, name}, schema}) |> count(t, id, [])
  end

  defp stage(t, {:instance, id, record}, staged) do
    keep_row(t, staged, id, {:instance, id, record.ref}, record, instance_size(record))
  end

  defp stage(t, {:instance_gone, id, ref}, staged), do: drop_row(t, staged, id, {:instance, id, ref})

  defp stage(t, {:function, id, function}, staged) do
    keep_row(t, staged, id, {:function, id, function.name}, function, byte_size(function.source))
  end

  defp stage(t, {:function_gone, id, name}, staged), do: drop_row(t, staged, id, {:function, id, name})

  defp stage(t, {:secret, id, name, sealed}, staged) do
    :ets.delete(t.clear, id)
    keep_row(t, staged, id, {:secret, id, name}, sealed, 0)
  end

  defp stage(t, {:secret_gone, id, name}, staged) do
    :ets.delete(t.clear, id)
    drop_row(t, staged, id, {:secret, id, name})
  end

  defp stage(t, {:result, id, key, result}, staged) do
    keep_row(t, staged, id, {:result, id, key}, result, :erlang.external_size(result.value), 0)
  end

  defp stage(t, {:result_gone, id, key}, staged), do: drop_row(t, staged, id, {:result, id, key}, 0)

  defp stage(t, {:begun, command}, staged) do
    if find(t, staged, {:session, command.session}) == nil, do: no_session!(command.session)
    :ets.insert(t.commands, {:command, command.id, command})
    staged
  end

  defp stage(t, {:tried, id, attempt}, staged) do
    update_command(t, id, &%{&1 | status: :running, error: nil, attempt: attempt})
    staged
  end

  defp stage(t, {:kept, id, error}, staged) do
    update_command(t, id, &%{&1 | status: :interrupted, error: error})
    staged
  end

  defp stage(t, {:called, id, n, call}, staged) do
    # Of commands that are unknown by now, a deleted session's, nothing comes back.
    if :ets.member(t.commands, id), do: :ets.insert(t.calls, {:call, {id, n}, call, :error})
    staged
  end

  defp stage(t, {:answered, id, n, reply}, staged) do
    :ets.update_element(t.calls, {id, n}, {4, {:ok, reply}})
    staged
  end

  defp stage(t, {:calls_gone, id, numbers}, staged) do
    for n <- numbers, do: :ets.delete(t.calls, {id, n})
    staged
  end

  defp stage(t, {:ended, id, outcome, at}, staged) do
    case command(t, id) do
      {:ok, command} ->
        calls = :ets.select_count(t.calls, [{{:call, {id, :_}, :_, :_}, [], [true]}])
        forget_command(t, id)
        error = with {:error, name} <- outcome, do: name, else: (:ok -> nil)
        command = command |> Map.drop([:params]) |> Map.merge(%{status: :ended, error: error, ended: at, calls: calls})
        remember(t, command)

      :error ->
        :ok
    end

    staged
  end

  defp stage(t, {:remembered, command}, staged) do
    if find(t, staged, {:session, command.session}) == nil, do: no_session!(command.session)
    remember(t, command)
    staged
  end

  defp stage(t, {:forgotten, id}, staged) do
    forget_command(t, id)
    staged
  end

  defp remember(t, command) do
    :ets.insert(t.ended, {:ended, next(:ets.last(t.ended)), command})
    if :ets.info(t.ended, :size) > @kept_commands, do: :ets.delete(t.ended, :ets.first(t.ended))
  end

  defp next(:"$end_of_table"), do: 1
  defp next(last), do: last + 1

  defp forget_command(t, id) do
    :ets.delete(t.commands, id)
    :ets.match_delete(t.calls, {:call, {id, :_}, :_, :_})
  end

  defp update_command(t, id, change) do
    with {:ok, command} <- command(t, id), do: :ets.insert(t.commands, {:command, id, change.(command)})
  end

  # What is current becomes history; as much of that as is kept.
  defp keep(t, id, name, known) do
    there = variable(known, :there)
    :ets.insert(t.history, {:put, {id, name, variable(known, :version)}, to_put(known)})
    kept = variable(known, :kept) + 1
    trim(t, id, name, kept, variable(known, :kept_bytes) + size_of(there, variable(known, :size)))
  end

  defp trim(t, id, name, kept, bytes) when kept >= t.versions or (bytes > @kept_bytes and kept > 0) do
    {^id, ^name, _version} = oldest = :ets.next(t.history, {id, name, 0})
    [{:put, _key, put}] = :ets.take(t.history, oldest)
    trim(t, id, name, kept - 1, bytes - size_of(put.there, put.size))
  end

  defp trim(_t, _id, _name, kept, bytes), do: {kept, bytes}

  defp keep_row(t, staged, id, {kind, _, _} = key, content, size, thing \\ 1) do
    known = find(t, staged, key)
    was = if known == nil, do: 0, else: elem(known, 3)
    growth = [things: if(known == nil, do: thing, else: 0), bytes: size - was]
    staged |> Map.put(key, {kind, key, content, size}) |> count(t, id, growth)
  end

  defp drop_row(t, staged, id, key, thing \\ 1) do
    case find(t, staged, key) do
      nil -> staged
      known -> drop(t, staged, id, key, things: -thing, bytes: -elem(known, 3))
    end
  end

  defp drop(t, staged, id, key, growth), do: staged |> Map.put(key, {:gone, key}) |> count(t, id, growth)

  defp count(staged, t, id, growth) do
    row = find(t, staged, {:session, id}) || no_session!(id)

    row =
      session_row(row,
        seq: session_row(row, :seq) + 1,
        things: session_row(row, :things) + Keyword.get(growth, :things, 0),
        bytes: session_row(row, :bytes) + Keyword.get(growth, :bytes, 0),
        deleted: session_row(row, :deleted) + Keyword.get(growth, :deleted, 0)
      )

    Map.put(staged, {:session, id}, row)
  end

  defp no_session!(id), do: misplaced!("there is no session #{inspect(id, printable_limit: 60)} that it could be of")

  defp find(t, staged, key) do
    case staged do
      %{^key => {:gone, _key}} -> nil
      %{^key => row} -> row
      %{} -> row(t, key)
    end
  end

  defp row(t, key) do
    case :ets.lookup(t.main, key) do
      [{:gone, _key}] -> nil
      [row] -> row
      [] -> nil
    end
  end

  defp count_of(true), do: 1
  defp count_of(false), do: 0
  defp size_of(true, size), do: size
  defp size_of(false, _size), do: 0

  @doc "Bytes of an instance's recipe and state."
  @spec instance_size(map()) :: non_neg_integer()
  def instance_size(record), do: :erlang.external_size({record.args, record.kwargs, record.state})

  defp to_put(row) do
    %{
      there: variable(row, :there),
      version: variable(row, :version),
      value: variable(row, :value),
      type: variable(row, :type),
      size: variable(row, :size),
      at: variable(row, :at),
      written: variable(row, :written),
      restores: variable(row, :restores)
    }
  end

  @doc "The facts that make an image what this one is."
  @spec facts(t()) :: Enumerable.t()
  def facts(%__MODULE__{} = t) do
    sessions = Stream.flat_map(sessions(t), &session_facts(t, &1))
    running = Stream.flat_map(commands(t), &command_facts(t, &1))
    Stream.concat([sessions, running, Stream.map(ended(t), &{:remembered, &1})])
  end

  @doc "Those of one session, without the journal."
  @spec session_facts(t(), map()) :: [fact()]
  def session_facts(%__MODULE__{} = t, %{id: id} = session) do
    puts = for name <- variable_names(t, id), put <- history(t, id, name), do: {:variable, id, name, put}

    owned =
      for kind <- [:type, :instance, :function, :secret, :result],
          {name, it} <- all(t, kind, id),
          do: owned(kind, id, name, it)

    [{:session, id, Map.take(session, [:created, :used, :ttl, :version, :lm])} | puts ++ owned]
  end

  defp owned(:instance, id, _ref, record), do: {:instance, id, record}
  defp owned(:function, id, _name, function), do: {:function, id, function}
  defp owned(kind, id, name, it), do: {kind, id, name, it}

  defp command_facts(t, command) do
    [
      {:begun, command}
      | Enum.flat_map(calls(t, command.id), fn %{n: n, reply: reply} = call ->
          called = {:called, command.id, n, Map.drop(call, [:n, :reply])}
          with {:ok, answer} <- reply, do: [called, {:answered, command.id, n, answer}], else: (:error -> [called])
        end)
    ]
  end

  # -- sessions --------------------------------------------------------------------------------------------------------

  @doc "A session's record, if it is there and has not expired."
  @spec session(t(), String.t()) :: {:ok, map()} | {:expired, map()} | :error
  def session(%__MODULE__{} = t, id) do
    case row(t, {:session, id}) do
      nil ->
        :error

      row ->
        known = described(row)
        if expired?(known, t.clock), do: {:expired, known}, else: {:ok, known}
    end
  end

  defp described(row) do
    {:session, id} = session_row(row, :key)
    live = session_row(row, :live)

    %{
      id: id,
      version: session_row(row, :version),
      seq: session_row(row, :seq),
      created: session_row(row, :created),
      used: :atomics.get(live, @used),
      ttl: session_row(row, :ttl),
      lm: session_row(row, :lm),
      things: session_row(row, :things),
      bytes: session_row(row, :bytes),
      deleted: session_row(row, :deleted),
      live: live
    }
  end

  @spec expired?(map(), (() -> integer())) :: boolean()
  def expired?(%{ttl: nil}, _clock), do: false
  def expired?(known, clock), do: :atomics.get(known.live, @busy) <= 0 and clock.() >= known.used + known.ttl

  @doc "It is used: its time to live begins anew. Any process may say so."
  @spec touch(t(), String.t()) :: :ok | {:expired, map()} | :error
  def touch(%__MODULE__{} = t, id) do
    case row(t, {:session, id}) do
      nil ->
        :error

      row when session_row(row, :ttl) == nil ->
        :ok

      row ->
        known = described(row)

        if expired?(known, t.clock) do
          {:expired, known}
        else
          :atomics.put(known.live, @used, t.clock.())
        end
    end
  end

  @doc "One command more, or fewer, runs in the session."
  @spec busy(t(), String.t(), 1 | -1) :: :ok
  def busy(%__MODULE__{} = t, id, change) do
    with row when row != nil <- row(t, {:session, id}) do
      live = session_row(row, :live)
      # When the work ends its time begins: first, or it would be expired for a moment.
      :atomics.put(live, @used, t.clock.())
      :atomics.add(live, @busy, change)
    end

    :ok
  end

  @spec sessions(t()) :: [map()]
  def sessions(%__MODULE__{} = t) do
    for row <- :ets.select(t.main, [{match_key({:session, :_}), [], [:"$_"]}]), elem(row, 0) == :session do
      described(row)
    end
  end

  @spec session_count(t()) :: non_neg_integer()
  def session_count(%__MODULE__{} = t), do: :ets.select_count(t.main, [{match_key({:session, :_}), [], [true]}])

  # Rows are of different sizes: a pattern for each.
  defp match_key({:session, _} = key), do: session_pattern(key)
  defp match_key({:variable, _, _} = key), do: variable_pattern(key)
  defp match_key({:type, _, _} = key), do: {:type, key, :_}
  defp match_key({kind, _, _} = key), do: {kind, key, :_, :_}

  defp session_pattern(key), do: session_row(_: :_, key: key)
  defp variable_pattern(key), do: variable(_: :_, key: key)

  # -- what a session owns ---------------------------------------------------------------------------------------------

  @doc "The newest version of a variable, be it a deletion."
  @spec put(t(), String.t(), String.t()) :: {:ok, put()} | :error
  def put(%__MODULE__{} = t, id, name) do
    case row(t, {:variable, id, name}) do
      nil -> :error
      row -> {:ok, to_put(row)}
    end
  end

  @spec value(t(), String.t(), String.t()) :: {:ok, term(), pos_integer()} | :error
  def value(%__MODULE__{} = t, id, name) do
    case row(t, {:variable, id, name}) do
      nil -> :error
      row when variable(row, :there) -> {:ok, variable(row, :value), variable(row, :version)}
      _deleted -> :error
    end
  end

  @doc "Name, version, type and size of every variable, by name."
  @spec list(t(), String.t()) :: [
          %{name: String.t(), version: pos_integer(), type: String.t(), size: non_neg_integer()}
        ]
  def list(%__MODULE__{} = t, id) do
    row = variable(_: :_, key: {:variable, id, :"$1"}, there: true, version: :"$2", type: :"$3", size: :"$4")

    for [name, version, type, size] <- :ets.match(t.main, row) do
      %{name: name, version: version, type: type, size: size}
    end
  end

  # Deleted ones are among them.
  defp variable_names(t, id), do: :ets.select(t.main, [{match_key({:variable, id, :"$1"}), [], [:"$1"]}])

  @doc "The versions of a variable that are kept, the oldest first."
  @spec history(t(), String.t(), String.t()) :: [put()]
  def history(%__MODULE__{} = t, id, name) do
    case put(t, id, name) do
      :error ->
        []

      {:ok, newest} ->
        older = :ets.select(t.history, [{{:put, {id, name, :_}, :"$1"}, [], [:"$1"]}])
        # What was newest a moment ago may be among them already.
        Enum.filter(older, &(&1.version < newest.version)) ++ [newest]
    end
  end

  @doc "What is there of that kind under that name: a record, a function, a sealed secret, a type, a result."
  @spec get(t(), :instance | :function | :secret | :type | :result, String.t(), String.t()) :: {:ok, term()} | :error
  def get(%__MODULE__{} = t, kind, id, name) do
    case row(t, {kind, id, name}) do
      nil -> :error
      row -> {:ok, elem(row, 2)}
    end
  end

  @doc "All of that kind, by name."
  @spec all(t(), :instance | :function | :secret | :type | :result, String.t()) :: [{String.t(), term()}]
  def all(%__MODULE__{} = t, kind, id) do
    for row <- :ets.select(t.main, [{match_key({kind, id, :_}), [], [:"$_"]}]) do
      {elem(elem(row, 1), 2), elem(row, 2)}
    end
  end

  @spec names(t(), :instance | :function | :secret | :type | :result, String.t()) :: [String.t()]
  def names(%__MODULE__{} = t, kind, id) do
    :ets.select(t.main, [{match_key({kind, id, :"$1"}), [], [:"$1"]}])
  end

  @doc "What the owner has kept for a session with `keep_clear/3`, until one of its secrets is set or deleted."
  @spec clear(t(), String.t()) :: {:ok, term()} | :error
  def clear(%__MODULE__{} = t, id) do
    case :ets.lookup(t.clear, id) do
      [{:clear, ^id, kept}] -> {:ok, kept}
      [] -> :error
    end
  end

  @spec keep_clear(t(), String.t(), term()) :: true
  def keep_clear(%__MODULE__{} = t, id, kept), do: :ets.insert(t.clear, {:clear, id, kept})

  @spec count(t(), :variable | :instance | :function | :secret, String.t()) :: non_neg_integer()
  def count(%__MODULE__{} = t, :variable, id) do
    pattern = variable(_: :_, key: {:variable, id, :_}, there: true)
    :ets.select_count(t.main, [{pattern, [], [true]}])
  end

  def count(%__MODULE__{} = t, kind, id), do: :ets.select_count(t.main, [{match_key({kind, id, :_}), [], [true]}])

  # -- the journal -----------------------------------------------------------------------------------------------------

  @spec command(t(), String.t()) :: {:ok, map()} | :error
  def command(%__MODULE__{} = t, id) do
    case :ets.lookup(t.commands, id) do
      [{:command, ^id, command}] -> {:ok, command}
      [] -> :error
    end
  end

  @spec calls(t(), String.t()) :: [map()]
  def calls(%__MODULE__{} = t, id) do
    for {:call, {_id, n}, call, reply} <- :ets.select(t.calls, [{{:call, {id, :_}, :_, :_}, [], [:"$_"]}]) do
      Map.merge(call, %{n: n, reply: reply})
    end
  end

  @doc "The commands that have not ended."
  @spec commands(t()) :: [map()]
  def commands(%__MODULE__{} = t) do
    Enum.sort_by(:ets.select(t.commands, [{{:command, :_, :"$1"}, [], [:"$1"]}]), &{&1.began, &1.id})
  end

  defp commands_of(t, session), do: Enum.filter(commands(t), &(&1.session == session))

  @doc "The commands that have ended, the oldest first."
  @spec ended(t()) :: [map()]
  def ended(%__MODULE__{} = t), do: :ets.select(t.ended, [{{:ended, :_, :"$1"}, [], [:"$1"]}])
end
