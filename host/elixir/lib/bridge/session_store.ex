defmodule Bridge.SessionStore do
  @moduledoc """
  The sessions of a bridge, and what they own: variables with their types and history, instances, functions.

      alias Bridge.SessionStore

      {:ok, 1} = SessionStore.set_variable("demo", "temperature", 0.7)
      {:ok, 0.7} = SessionStore.get_variable("demo", "temperature")
      {:ok, %{"a" => 1, "b" => 1}} = SessionStore.update_variables("demo", %{"a" => 1, "b" => 2})

  State is in ETS. To read is a look-up by the caller itself, in microseconds, however many read at once. What changes
  goes through the store's owner, in order: versions have no gap, and what belongs together is seen together or not at
  all. With `store: "directory"` a write is on disk when its function returns.

  To write makes the session if it is not there. `session` is its id, or a `%Bridge.Session{}`; with an id, `bridge:`
  says which bridge (`Bridge` by default). Names are strings; atoms are taken as theirs.
  """

  alias Bridge.{Config, Error, Options, Result}
  alias Bridge.Store.{Commit, Owner, Plain, Tables, Types}

  @type session :: String.t() | struct()
  @type name :: String.t() | atom()
  @type result(value) :: {:ok, value} | {:error, Error.t()}
  @type variable :: %{
          name: String.t(),
          value: term(),
          version: pos_integer(),
          type: String.t(),
          size: non_neg_integer(),
          written: integer(),
          restores: pos_integer() | nil,
          schema: map() | nil
        }
  @type version :: %{
          version: pos_integer(),
          value: term(),
          deleted: boolean(),
          type: String.t() | nil,
          at: non_neg_integer(),
          written: integer(),
          restores: pos_integer() | nil
        }

  @consistent_tries 20

  @doc false
  @spec start_link(struct(), keyword()) :: GenServer.on_start()
  def start_link(cfg, opts \\ []), do: Owner.start_link(cfg, opts)

  @doc false
  @spec child_spec(struct()) :: Supervisor.child_spec()
  # To put everything on disk may take a while.
  def child_spec(cfg), do: %{id: __MODULE__, start: {__MODULE__, :start_link, [cfg]}, shutdown: 30_000}

  # -- sessions --------------------------------------------------------------------------------------------------------

  @doc """
  Opens the session of that id, made if there is none; `nil` makes one with an id of its own.

  `ttl:` becomes its time to live: how many milliseconds it may be unused before it expires, `nil` for ever.
  """
  @spec create_session(session() | nil, keyword()) :: result(String.t())
  def create_session(session \\ nil, opts \\ []) do
    session = session || "session-" <> Base.encode16(:crypto.strong_rand_bytes(6), case: :lower)

    with {:ok, cfg, id} <- asked(session, opts, [:ttl]),
         {:ok, ttl} <- ttl(opts),
         do: Owner.call(cfg, {:create, id, ttl})
  end

  defp ttl(opts) do
    case Keyword.get(opts, :ttl, :default) do
      ttl when ttl in [nil, :default] or (is_integer(ttl) and ttl > 0) ->
        {:ok, ttl}

      other ->
        Error.error(:invalid_params, "ttl is how many milliseconds there are, more than 0, not #{inspect(other)}")
    end
  end

  @doc "The ids of all sessions."
  @spec sessions(keyword()) :: result([String.t()])
  def sessions(opts \\ []) do
    with {:ok, cfg} <- Options.bridge(opts) do
      reading(cfg, fn tables ->
        {:ok, for(known <- Tables.sessions(tables), not Tables.expired?(known, tables.clock), do: known.id)}
      end)
    end
  end

  @doc "Forgets a session and all it owns, its part of the journal included."
  @spec delete_session(session(), keyword()) :: :ok | {:error, Error.t()}
  def delete_session(session, opts \\ []) do
    with {:ok, cfg, id} <- asked(session, opts), do: Owner.call(cfg, {:delete_session, id})
  end

  @doc """
  A session, described: what it holds and when it expires. Times are in milliseconds since the epoch.
  """
  @spec describe(session(), keyword()) :: result(map())
  def describe(session, opts \\ []) do
    with {:ok, cfg, id} <- asked(session, opts) do
      reading(cfg, fn tables ->
        with {:ok, known} <- Commit.session(tables, id) do
          {:ok,
           %{
             id: id,
             version: known.version,
             created: known.created,
             used: known.used,
             ttl: known.ttl,
             expires: known.ttl && known.used + known.ttl,
             variables: Tables.count(tables, :variable, id),
             instances: Tables.count(tables, :instance, id),
             functions: Tables.count(tables, :function, id),
             secrets: Tables.count(tables, :secret, id),
             bytes: known.bytes
           }}
        end
      end)
    end
  end

  # -- variables -------------------------------------------------------------------------------------------------------

  @doc """
  Writes a variable; its new version is returned.

  With `if_version:` only if it is at that version (0: not there), else `:conflict`. `:invalid_value` if it does not fit
  the variable's type, `:not_serializable` if it cannot cross the bridge.
  """
  @spec set_variable(session(), name(), term(), keyword()) :: result(pos_integer())
  def set_variable(session, name, value, opts \\ []) do
    name = text(name)

    with {:ok, cfg, id} <- asked(session, opts, [:if_version]),
         {:ok, if_version} <- if_version(opts[:if_version]),
         {:ok, versions} <- write(cfg, id, [{:set, name, value, if_version}]) do
      {:ok, Map.fetch!(versions, name)}
    end
  end

  @doc "As `set_variable/4`, but it raises."
  @spec set_variable!(session(), name(), term(), keyword()) :: pos_integer()
  def set_variable!(session, name, value, opts \\ []), do: Result.bang(set_variable(session, name, value, opts))

  @doc "Reads a variable; `:not_found` names what there is."
  @spec get_variable(session(), name(), keyword()) :: result(term())
  def get_variable(session, name, opts \\ []) do
    name = text(name)

    with {:ok, cfg, id} <- asked(session, opts) do
      reading(cfg, fn tables ->
        with :ok <- used(tables, id), {:ok, value, _version} <- found(tables, id, name), do: {:ok, value}
      end)
    end
  end

  @doc "As `get_variable/3`, but it raises."
  @spec get_variable!(session(), name(), keyword()) :: term()
  def get_variable!(session, name, opts \\ []), do: Result.bang(get_variable(session, name, opts))

  @doc """
  Writes several variables at once: all of them or, if one is refused, none. Returns their versions.

  `changes` is a map, or a list of pairs. `if_versions: %{name => version}` as with `set_variable/4`; `delete: [name]`
  deletes in the same commit.
  """
  @spec update_variables(session(), %{name() => term()} | [{name(), term()}], keyword()) ::
          result(%{String.t() => pos_integer()})
  def update_variables(session, changes, opts \\ []) do
    with {:ok, cfg, id} <- asked(session, opts, [:if_versions, :delete]),
         {:ok, expected} <- if_versions(opts[:if_versions] || %{}) do
      sets = for {name, value} <- changes, do: {:set, text(name), value, expected[text(name)]}
      deletes = for name <- opts[:delete] || [], do: {:delete, text(name), expected[text(name)]}
      write(cfg, id, sets ++ deletes)
    end
  end

  @doc "As `update_variables/3`, but it raises."
  @spec update_variables!(session(), %{name() => term()} | [{name(), term()}], keyword()) :: %{
          String.t() => pos_integer()
        }
  def update_variables!(session, changes, opts \\ []), do: Result.bang(update_variables(session, changes, opts))

  @doc "Deletes a variable. Its versions go on: the deletion is one, and is returned. Takes `if_version:`."
  @spec delete_variable(session(), name(), keyword()) :: result(pos_integer())
  def delete_variable(session, name, opts \\ []) do
    name = text(name)

    with {:ok, cfg, id} <- asked(session, opts, [:if_version]),
         {:ok, if_version} <- if_version(opts[:if_version]),
         {:ok, _value} <- get_variable(session, name, Keyword.take(opts, [:bridge])),
         {:ok, told} <- Owner.call(cfg, {:commit, nil, id, [{:delete, name, if_version}], nil, false}) do
      {:ok, Map.fetch!(told.versions, name)}
    end
  end

  @doc "Name, version, type and size of every variable, by name."
  @spec variables(session(), keyword()) :: result([map()])
  def variables(session, opts \\ []) do
    with {:ok, cfg, id} <- asked(session, opts) do
      reading(cfg, fn tables ->
        with :ok <- used(tables, id) do
          {:ok, consistent(cfg, tables, id, [], &Tables.list(&1, id))}
        end
      end)
    end
  end

  @doc "A variable with all that is known of it: value, version, type, size, when it was written, its schema."
  @spec variable(session(), name(), keyword()) :: result(variable())
  def variable(session, name, opts \\ []) do
    name = text(name)

    with {:ok, cfg, id} <- asked(session, opts) do
      reading(cfg, fn tables ->
        with :ok <- used(tables, id), {:ok, _value, _version} <- found(tables, id, name) do
          {:ok, put} = Tables.put(tables, id, name)
          known = Map.take(put, [:value, :version, :type, :size, :written, :restores])
          {:ok, Map.merge(known, %{name: name, schema: schema(tables, id, name)})}
        end
      end)
    end
  end

  @doc "The versions of a variable that are kept, the oldest first, deletions too: the last 100, 16 MiB at most."
  @spec history(session(), name(), keyword()) :: result([version()])
  def history(session, name, opts \\ []) do
    name = text(name)

    with {:ok, cfg, id} <- asked(session, opts) do
      reading(cfg, fn tables ->
        with :ok <- used(tables, id) do
          case consistent(cfg, tables, id, [], &Tables.history(&1, id, name)) do
            [] -> Commit.missing(id, "variable", name, names(tables, id))
            puts -> {:ok, Enum.map(puts, &version/1)}
          end
        end
      end)
    end
  end

  defp version(put) do
    put |> Map.take([:version, :value, :type, :at, :written, :restores]) |> Map.put(:deleted, not put.there)
  end

  @doc "Brings an earlier version back, as a new one, whose number is returned."
  @spec revert(session(), name(), pos_integer(), keyword()) :: result(pos_integer())
  def revert(session, name, version, opts \\ []) do
    name = text(name)

    with {:ok, cfg, id} <- asked(session, opts),
         {:ok, versions} <- history(session, name, opts) do
      case Enum.find(versions, &(&1.version == version)) do
        nil ->
          Error.error(:not_found, "version #{version} of #{inspect(name)} is not kept",
            remedy: "Bridge.SessionStore.history(session, name) has those that are."
          )

        %{deleted: true} ->
          delete_variable(session, name, opts)

        found ->
          how = [restores: found.restores || found.version, type: found.type]

          with {:ok, told} <- commit_prepared(cfg, nil, id, [{:set, name, found.value, nil}], nil, false, how) do
            {:ok, Map.fetch!(told.versions, name)}
          end
      end
    end
  end

  @doc """
  Gives a variable a type, or takes it away (`nil`). From then on what does not fit is refused, whoever writes it.

      SessionStore.set_type("demo", "temperature", :float, ge: 0.0, le: 2.0, default: 0.7)
      SessionStore.set_type("demo", "style", :choice, choices: ["short", "long"])
      SessionStore.set_type("demo", "query", :embedding, dimensions: 3)
      SessionStore.set_type("demo", "answer", %{"type" => "object", "required" => ["text"]})

  Types: `:float`, `:integer`, `:string`, `:boolean`, `:choice`, `:list`, `:map` (also `:dict`), `:tensor` (`dtype`,
  `shape` with `nil` for any size), `:embedding` (`dimensions`), `:module` (`choices`, dotted names of classes), `:any`;
  or any JSON Schema. Constraints, where they fit: `ge`, `gt`, `le`, `lt`, `multiple_of`; `min_length`, `max_length`;
  `pattern`; `enum`; `default`, which is written if there is no value yet; `description`. Returns the schema.
  """
  @spec set_type(session(), name(), atom() | String.t() | map() | nil, keyword()) :: result(map() | nil)
  def set_type(session, name, type, opts \\ []) do
    name = text(name)
    {where, constraints} = Keyword.split(opts, [:bridge])

    with {:ok, cfg, id} <- asked(session, where),
         :ok <- Plain.check_name("variable", name),
         {:ok, schema} <- if(type == nil, do: {:ok, nil}, else: Types.make(type, constraints)),
         {:ok, default} <- if(schema == nil, do: {:ok, :none}, else: Types.default(schema)),
         {:ok, fits} <- reading(cfg, &fits(&1, id, name, schema)) do
      Owner.call(cfg, {:change, id, true, &define(&1, name, schema, default, fits)})
    end
  end

  # The version that the type was compared with, here: it may take long.
  defp fits(tables, id, name, schema) do
    known =
      if match?({:ok, _}, Tables.session(tables, id)), do: Commit.known(tables, id, name), else: Commit.unwritten()

    with :ok <- if(known.there, do: Types.check(schema, name, known.value), else: :ok), do: {:ok, known.version}
  end

  defp define(at, name, schema, default, fits) do
    known = Commit.known(at.tables, at.id, name)

    ops =
      case default do
        {:ok, value} when not known.there -> [{:set, name, Commit.measured(value, schema(at.tables, at.id, name)), nil}]
        _none -> []
      end

    # Written meanwhile, perhaps.
    with :ok <- if(known.there and known.version != fits, do: Types.check(schema, name, known.value), else: :ok),
         {:ok, facts, _told} <- Commit.plan(at.tables, at.quota, at.id, ops, at.now) do
      {:ok, facts ++ [{:type, at.id, name, schema}], {:ok, schema}}
    end
  end

  # -- for the engine: variables ---------------------------------------------------------------------------------------

  @doc false
  @spec tables!(struct()) :: Tables.t()
  defdelegate tables!(cfg), to: Owner

  @doc false
  @spec fetch(struct(), String.t(), String.t()) :: {:ok, term(), pos_integer()} | :error
  def fetch(cfg, session, name) do
    tables = tables!(cfg)
    if Tables.touch(tables, session) == :ok, do: Tables.value(tables, session, name), else: :error
  end

  @doc false
  # Those that exist, as they were at one moment.
  @spec fetch_many(struct(), String.t(), [String.t()]) :: %{String.t() => {term(), pos_integer()}}
  def fetch_many(cfg, session, names) do
    consistent(cfg, tables!(cfg), session, %{}, fn tables ->
      for name <- names, {:ok, value, version} <- [Tables.value(tables, session, name)], into: %{} do
        {name, {value, version}}
      end
    end)
  end

  @doc false
  @spec list(struct(), String.t()) :: [map()]
  def list(cfg, session), do: consistent(cfg, tables!(cfg), session, [], &Tables.list(&1, session))

  @doc false
  # One transaction, on disk when it returns. With a command's id, which must be running, that command ends with it, and
  # `result`, of an idempotency key, is kept with it.
  @spec commit(struct(), String.t() | nil, String.t(), [Commit.op()], map() | nil) ::
          {:ok, %{versions: map(), instances: map(), version: non_neg_integer()}} | {:error, Error.t()}
  def commit(cfg, command, session, ops, result \\ nil) do
    commit_prepared(cfg, command, session, ops, result, false, [])
  end

  defp commit_prepared(cfg, command, session, ops, result, make, how) do
    with {:ok, prepared} <- reading(cfg, &Commit.prepare(&1, session, ops, how)) do
      Owner.call(cfg, {:commit, command, session, prepared, result, make})
    end
  end

  # -- for the engine: instances, functions, sessions ------------------------------------------------------------------

  @doc false
  # By its ref, or by its name.
  @spec instance(struct(), String.t(), String.t()) :: {:ok, map()} | :error
  def instance(cfg, session, ref) do
    tables = tables!(cfg)

    with :ok <- Tables.touch(tables, session),
         :error <- Tables.get(tables, :instance, session, ref) do
      Enum.find_value(Tables.all(tables, :instance, session), :error, fn {_ref, it} -> it.name == ref && {:ok, it} end)
    else
      {:ok, record} -> {:ok, record}
      _gone -> :error
    end
  end

  @doc false
  @spec instances(struct(), String.t()) :: [map()]
  def instances(cfg, session), do: for({_ref, record} <- Tables.all(tables!(cfg), :instance, session), do: record)

  @doc false
  @spec name_instance(struct(), String.t(), String.t(), String.t()) :: :ok | {:error, Error.t()}
  def name_instance(cfg, session, ref, name) do
    Owner.call(
      cfg,
      {:change, session, false,
       fn at ->
         with {:ok, known} <- Commit.instance(at.tables, at.id, ref),
              named = %{known | name: name},
              :ok <- Commit.check_unnamed(at, named) do
           {:ok, [{:instance, at.id, named}], :ok}
         end
       end}
    )
  end

  @doc false
  @spec function(struct(), String.t(), String.t()) :: {:ok, map()} | :error
  def function(cfg, session, name), do: Tables.get(tables!(cfg), :function, session, name)

  @doc false
  # `name` and `source`; `lm: boolean`, `secrets: [name]`, `cache: seconds | nil` and whatever else is plain data.
  # `hash` is made here.
  @spec put_function(struct(), String.t(), map()) :: :ok | {:error, Error.t()}
  def put_function(cfg, session, %{name: name, source: source} = function) do
    hash = Base.encode16(:crypto.hash(:sha256, source), case: :lower)
    function = Map.merge(%{lm: false, secrets: [], cache: nil}, Map.put(function, :hash, hash))

    with :ok <- Plain.check_name("function", name) do
      Owner.call(
        cfg,
        {:change, session, true,
         fn at ->
           {more, was} =
             case Tables.get(at.tables, :function, at.id, name) do
               {:ok, known} -> {0, byte_size(known.source)}
               :error -> {1, 0}
             end

           growth = %{more: more, new: 0, bytes: byte_size(source) - was}
           with :ok <- Commit.check_quota(at.quota, at.session, growth), do: {:ok, [{:function, at.id, function}], :ok}
         end}
      )
    end
  end

  @doc false
  @spec delete_function(struct(), String.t(), String.t()) :: :ok | {:error, Error.t()}
  def delete_function(cfg, session, name) do
    Owner.call(
      cfg,
      {:change, session, false,
       fn at ->
         case Tables.get(at.tables, :function, at.id, name) do
           {:ok, _function} -> {:ok, [{:function_gone, at.id, name}], :ok}
           :error -> Commit.missing(at.id, "function", name, Tables.names(at.tables, :function, at.id))
         end
       end}
    )
  end

  @doc false
  # The session's language model without its key: %{model, api_base, adapter, options}.
  @spec lm(struct(), String.t()) :: map() | nil
  def lm(cfg, session) do
    case Tables.session(tables!(cfg), session) do
      {:ok, known} -> known.lm
      _none -> nil
    end
  end

  @doc false
  @spec put_lm(struct(), String.t(), map() | nil) :: :ok | {:error, Error.t()}
  def put_lm(cfg, session, lm) do
    with :ok <- check_lm(lm), do: change_lm(cfg, session, lm)
  end

  defp check_lm(nil), do: :ok

  defp check_lm(%{model: model, api_base: base, adapter: adapter, options: %{}}) do
    if is_binary(model) and Enum.all?([base, adapter], &(&1 == nil or is_binary(&1))) do
      :ok
    else
      Error.error(:invalid_params, "a language model's name, api_base and adapter are strings")
    end
  end

  defp change_lm(cfg, session, lm) do
    Owner.call(
      cfg,
      {:change, session, true,
       fn at ->
         put = %{created: at.session.created, used: at.now, ttl: at.session.ttl, version: at.session.version, lm: lm}
         {:ok, [{:session, at.id, put}], :ok}
       end}
    )
  end

  @doc false
  @spec touch(struct(), String.t()) :: :ok | {:error, Error.t()}
  def touch(cfg, session) do
    tables = tables!(cfg)

    with :gone <- if(Tables.touch(tables, session) == :ok, do: :ok, else: :gone),
         {:ok, _session} <- Commit.session(tables, session),
         do: :ok
  end

  @doc false
  # A session at work does not expire. It ends with the process.
  @spec busy(struct(), String.t(), pid()) :: :ok | {:error, Error.t()}
  def busy(cfg, session, pid), do: Owner.call(cfg, {:busy, session, pid})

  @doc false
  # The process is sent `{:bridge_session, :made | :gone, id, unique_integer}` from then on.
  @spec watch_sessions(struct(), pid()) :: :ok
  def watch_sessions(cfg, pid \\ self()), do: Owner.call(cfg, {:watch, pid})

  @doc false
  # Forgets what has had its time, at once; the ids of the sessions that had.
  @spec sweep(struct()) :: [String.t()]
  def sweep(cfg), do: Owner.call(cfg, :sweep)

  # -- for the engine: the journal -------------------------------------------------------------------------------------

  @doc false
  # A command runs: for the first time, or again if its id is known and it has not ended; then what it called back is
  # still there. Makes the session if there is none. With `sealed: true`, for commands that carry secrets, what it was
  # asked, what it called back and its kept result are sealed.
  @spec begin_command(struct(), map()) :: :ok | {:error, Error.t()}
  def begin_command(cfg, %{id: _, session: _} = command) do
    began = tables!(cfg).clock.()
    blank = %{method: nil, subject: nil, params: nil, key: nil, digest: nil, attempt: 1, sealed: false}
    command = blank |> Map.merge(command) |> Map.merge(%{began: began, status: :running, error: nil})
    Owner.call(cfg, {:begin, command})
  end

  @doc false
  # The running command is being tried once more: which attempt this is. On disk soon.
  @spec tried(struct(), String.t(), pos_integer()) :: :ok | {:error, Error.t()}
  def tried(cfg, command, attempt), do: Owner.call(cfg, {:tried, command, attempt})

  @doc false
  # `call`: `seq`, `method`, `asked` (any term), `effect` (whether it may have one), and whatever else is plain data.
  # With `sync: true` it is on disk when this returns: so is a tool's call before the tool runs.
  @spec record_call(struct(), String.t(), pos_integer(), map(), keyword()) :: :ok | {:error, Error.t()}
  def record_call(cfg, command, n, call, opts \\ []) do
    Owner.call(cfg, {:called, command, n, call, Keyword.get(opts, :sync, false)})
  end

  @doc false
  @spec record_reply(struct(), String.t(), pos_integer(), term()) :: :ok | {:error, Error.t()}
  def record_reply(cfg, command, n, reply), do: Owner.call(cfg, {:answered, command, n, reply})

  @doc false
  @spec forget_calls(struct(), String.t(), [pos_integer()]) :: :ok | {:error, Error.t()}
  def forget_calls(cfg, command, numbers), do: Owner.call(cfg, {:calls_gone, command, numbers})

  @doc false
  # With `keep: true` a command that failed stays, with what it called back, among those that were interrupted. One that
  # has been committed has ended with its commit: then this does nothing.
  @spec end_command(struct(), String.t(), :ok | {:error, atom()}, keyword()) :: :ok | {:error, Error.t()}
  def end_command(cfg, command, outcome, opts \\ []) do
    Owner.call(cfg, {:end, command, outcome, Keyword.get(opts, :keep, false)})
  end

  @doc false
  # Those that were running when the host ended, or were kept, in the order in which they began.
  @spec interrupted(struct()) :: [map()]
  def interrupted(cfg) do
    for %{status: :interrupted} = command <- Tables.commands(tables!(cfg)), do: Map.drop(command, [:params])
  end

  @doc false
  # `calls` are maps as they were recorded, with `n` and `reply: {:ok, term} | :error`, in order.
  @spec command(struct(), String.t()) :: {:ok, map()} | :error | {:error, Error.t()}
  def command(cfg, id) do
    tables = tables!(cfg)

    with {:ok, command} <- Tables.command(tables, id) do
      command = Map.put(command, :calls, Tables.calls(tables, id))
      if command.sealed, do: unsealed(cfg, command), else: {:ok, command}
    end
  end

  defp unsealed(cfg, command) do
    Owner.call(
      cfg,
      {:with_vault,
       fn vault, _tables ->
         open = &Owner.unseal(vault, &1, command.id)

         with {:ok, params} <- open.(command.params), {:ok, calls} <- unsealed_calls(command.calls, open) do
           {:ok, %{command | params: params, calls: calls}}
         end
       end}
    )
  end

  defp unsealed_calls(calls, open) do
    Result.map(calls, fn call ->
      with {:ok, asked} <- open.(call.asked), {:ok, reply} <- unsealed_reply(call.reply, open) do
        {:ok, %{call | asked: asked, reply: reply}}
      end
    end)
  end

  defp unsealed_reply(:error, _open), do: {:ok, :error}
  defp unsealed_reply({:ok, reply}, open), do: with({:ok, reply} <- open.(reply), do: {:ok, {:ok, reply}})

  @doc false
  # The running or interrupted command with that idempotency key.
  @spec command_with_key(struct(), String.t(), String.t()) :: {:ok, map()} | :error | {:error, Error.t()}
  def command_with_key(cfg, session, key) do
    case Enum.find(Tables.commands(tables!(cfg)), &(&1.session == session and &1.key == key)) do
      nil -> :error
      %{id: id} -> command(cfg, id)
    end
  end

  @doc false
  @spec drop(struct(), String.t()) :: :ok | {:error, Error.t()}
  def drop(cfg, command), do: Owner.call(cfg, {:drop, command})

  @doc false
  # The last 10,000 commands that have ended and those that have not, the oldest first.
  @spec journal(struct(), String.t() | nil) :: [map()]
  def journal(cfg, session \\ nil) do
    tables = tables!(cfg)
    running = for command <- Tables.commands(tables), do: Map.drop(command, [:params])
    commands = Tables.ended(tables) ++ running
    if session == nil, do: commands, else: Enum.filter(commands, &(&1.session == session))
  end

  @doc false
  # What the command with that idempotency key gave, within 24 hours.
  @spec result(struct(), String.t(), String.t()) ::
          {:ok, %{digest: term(), value: term()}} | :error | {:error, Error.t()}
  def result(cfg, session, key) do
    tables = tables!(cfg)

    with {:ok, known} <- Tables.get(tables, :result, session, key),
         true <- tables.clock.() < known.ended + Owner.key_ms() || :error do
      case known.value do
        {:sealed, _bytes} = sealed ->
          opened = Owner.call(cfg, {:with_vault, fn vault, _tables -> Owner.unseal(vault, sealed, known.command) end})
          with {:ok, value} <- opened, do: {:ok, %{digest: known.digest, value: value}}

        value ->
          {:ok, %{digest: known.digest, value: value}}
      end
    end
  end

  # -- helpers ---------------------------------------------------------------------------------------------------------

  @doc false
  # As `target/2`, and the options are looked at.
  @spec asked(session(), keyword(), [atom()]) :: {:ok, struct(), String.t()} | {:error, Error.t()}
  def asked(session, opts, more \\ []) do
    with :ok <- Options.check(opts, [:bridge | more]), do: target(session, opts)
  end

  defp if_version(nil), do: {:ok, nil}
  defp if_version(version) when is_integer(version) and version >= 0, do: {:ok, version}

  defp if_version(other) do
    Error.error(:invalid_params, "if_version is a version: a whole number, 0 for none, not #{inspect(other, limit: 3)}")
  end

  defp if_versions(versions) do
    one = fn {name, version} -> with {:ok, version} <- if_version(version), do: {:ok, {text(name), version}} end
    with {:ok, pairs} <- Result.map(versions, one), do: {:ok, Map.new(pairs)}
  end

  @doc false
  @spec target(session(), keyword()) :: {:ok, struct(), String.t()} | {:error, Error.t()}
  # `opts` may have others than `bridge:`, which whoever calls this has looked at.
  def target(session, opts) do
    with {:ok, bridge, id} <- Bridge.Session.whose(session, opts),
         :ok <- Plain.check_name("session", id),
         {:ok, cfg} <- Config.fetch(bridge),
         do: {:ok, cfg, id}
  end

  defp text(name) when is_atom(name) and name not in [nil, true, false], do: Atom.to_string(name)
  defp text(name), do: name

  defp write(cfg, id, ops) do
    with {:ok, ops} <- normal(ops, Plain.hook(cfg.name, id)),
         {:ok, told} <- commit_prepared(cfg, nil, id, ops, nil, true, []) do
      {:ok, told.versions}
    end
  end

  defp normal(ops, hook) do
    Result.map(ops, fn
      {:set, name, value, if_version} ->
        with :ok <- Plain.check_name("variable", name), {:ok, value} <- Plain.normal(value, name, hook) do
          {:ok, {:set, name, value, if_version}}
        end

      op ->
        {:ok, op}
    end)
  end

  defp used(tables, id) do
    case Tables.touch(tables, id) do
      :ok -> :ok
      _gone -> with {:ok, _session} <- Commit.session(tables, id), do: :ok
    end
  end

  defp found(tables, id, name) do
    with :error <- Tables.value(tables, id, name), do: Commit.missing(id, "variable", name, names(tables, id))
  end

  defp names(tables, id), do: for(known <- Tables.list(tables, id), do: known.name)

  defp schema(tables, id, name) do
    case Tables.get(tables, :type, id, name) do
      {:ok, schema} -> schema
      :error -> nil
    end
  end

  @doc false
  # The tables end with their owner: who reads at that moment is told so.
  @spec reading(struct(), (Tables.t() -> result)) :: result | {:error, Error.t()} when result: term()
  def reading(cfg, read) do
    with {:ok, tables} <- Owner.tables(cfg) do
      try do
        read.(tables)
      rescue
        error in ArgumentError ->
          if :ets.info(tables.main, :id) == :undefined, do: Owner.closed(cfg), else: reraise(error, __STACKTRACE__)
      end
    end
  end

  # What several look-ups find is of one moment if nothing of the session has changed meanwhile. Of one that is gone it
  # is `none`, though some of what it owned may be there for a moment more.
  defp consistent(cfg, tables, id, none, read, tries \\ @consistent_tries)
  defp consistent(cfg, _tables, _id, _none, read, 0), do: Owner.call(cfg, {:read, read})

  defp consistent(cfg, tables, id, none, read, tries) do
    case moment(tables, id) do
      nil ->
        none

      before ->
        found = read.(tables)
        if moment(tables, id) == before, do: found, else: consistent(cfg, tables, id, none, read, tries - 1)
    end
  end

  defp moment(tables, id) do
    case Tables.session(tables, id) do
      {_state, known} -> {known.created, known.seq}
      :error -> nil
    end
  end
end
