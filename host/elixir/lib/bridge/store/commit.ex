defmodule Bridge.Store.Commit do
  @moduledoc false
  # What a commit does to a session: its operations checked against the image, and the facts that they make.

  alias Bridge.Error
  alias Bridge.Store.{Plain, Tables, Types}

  @type op ::
          {:set, String.t(), term(), non_neg_integer() | nil}
          | {:delete, String.t(), non_neg_integer() | nil}
          | {:instance, map(), pos_integer() | nil}
          | {:delete_instance, String.t()}

  @doc """
  The operations with each value measured and compared with its variable's type: what takes long, and needs no owner.

  `restores:` is the version that all values bring back.
  """
  @spec prepare(Tables.t(), String.t(), [op()], keyword()) :: {:ok, [tuple()]} | {:error, Error.t()}
  def prepare(tables, session, ops, opts \\ []) do
    ops
    |> Enum.reduce_while([], fn op, done ->
      case prepare_op(tables, session, op, opts) do
        {:ok, prepared} -> {:cont, [prepared | done]}
        {:error, error} -> {:halt, {:error, error}}
      end
    end)
    |> case do
      {:error, error} -> {:error, error}
      done -> {:ok, Enum.reverse(done)}
    end
  end

  defp prepare_op(tables, session, {:set, name, value, if_version}, opts) do
    schema = schema_of(tables, session, name)

    with :ok <- Plain.check_name("variable", name), :ok <- Types.check(schema, name, value) do
      {:ok, {:set, name, measured(value, schema, opts), if_version}}
    end
  end

  defp prepare_op(_tables, _session, op, _opts), do: {:ok, op}

  @doc "A value with what the store says of it. `schema` is the type that it was compared with."
  @spec measured(term(), map() | nil, keyword()) :: map()
  def measured(value, schema, opts \\ []) do
    %{
      value: value,
      type: Keyword.get_lazy(opts, :type, fn -> Plain.type_name(value) end),
      size: :erlang.external_size(value),
      restores: Keyword.get(opts, :restores),
      schema: schema
    }
  end

  @doc "The facts that prepared operations make, and what the caller is told."
  @spec plan(Tables.t(), map(), String.t(), [tuple()], integer()) ::
          {:ok, [Tables.fact()], %{versions: map(), instances: map(), version: non_neg_integer()}} | {:error, Error.t()}
  def plan(tables, quota, id, ops, now) do
    with {:ok, session} <- session(tables, id) do
      at = if ops == [], do: session.version, else: session.version + 1

      plan = %{
        tables: tables,
        id: id,
        at: at,
        now: now,
        facts: [],
        versions: %{},
        instances: %{},
        more: 0,
        new: 0,
        bytes: 0
      }

      with {:ok, plan} <- each(merged(ops), plan),
           :ok <- check_quota(quota, session, plan) do
        at = if plan.facts == [], do: session.version, else: at
        put = %{created: session.created, used: now, ttl: session.ttl, version: at, lm: session.lm}
        facts = if plan.facts == [], do: [], else: [{:session, id, put} | Enum.reverse(plan.facts)]
        {:ok, facts, %{versions: plan.versions, instances: plan.instances, version: at}}
      end
    end
  end

  @doc "The session's record; `:not_found` if it is gone or has expired."
  @spec session(Tables.t(), String.t()) :: {:ok, map()} | {:error, Error.t()}
  def session(tables, id) do
    case Tables.session(tables, id) do
      {:ok, session} ->
        {:ok, session}

      {:expired, session} ->
        Error.error(:not_found, "session #{inspect(id)} has expired: it was not used for #{session.ttl} ms",
          remedy: "Open it anew: Bridge.SessionStore.create_session(id, ttl: …)."
        )

      :error ->
        Error.error(:not_found, "there is no session #{inspect(id)}",
          remedy: "Open it: Bridge.SessionStore.create_session(#{inspect(id)})."
        )
    end
  end

  # A command that writes a variable twice writes it once: as last written, if it is at the version that was asked for
  # first.
  defp merged(ops) do
    {order, by_name} =
      Enum.reduce(ops, {[], %{}}, fn op, {order, by_name} ->
        key = key_of(op)

        case by_name do
          %{^key => earlier} -> {order, %{by_name | key => again(earlier, op)}}
          %{} -> {[key | order], Map.put(by_name, key, op)}
        end
      end)

    order |> Enum.reverse() |> Enum.map(&Map.fetch!(by_name, &1))
  end

  defp key_of({:set, name, _value, _if_version}), do: {:variable, name}
  defp key_of({:delete, name, _if_version}), do: {:variable, name}
  defp key_of({:instance, record, _expected}), do: {:instance, record.ref}
  defp key_of({:delete_instance, ref}), do: {:instance, ref}

  defp again({:set, _, _, if_version}, {:set, name, value, _}), do: {:set, name, value, if_version}
  defp again({:delete, _, if_version}, {:set, name, value, _}), do: {:set, name, value, if_version}
  defp again({:set, _, _, if_version}, {:delete, name, _}), do: {:delete, name, if_version}
  defp again({:instance, _, expected}, {:instance, record, _}), do: {:instance, record, expected}
  defp again({:instance, _, nil}, {:delete_instance, _ref}), do: :nothing
  defp again(_earlier, op), do: op

  defp each(ops, plan) do
    Enum.reduce_while(ops, {:ok, plan}, fn op, {:ok, plan} ->
      case one(op, plan) do
        {:ok, plan} -> {:cont, {:ok, plan}}
        {:error, error} -> {:halt, {:error, error}}
      end
    end)
  end

  defp one(:nothing, plan), do: {:ok, plan}

  defp one({:set, name, new, if_version}, plan) do
    known = known(plan.tables, plan.id, name)
    schema = schema_of(plan.tables, plan.id, name)

    with :ok <- check_version(name, known, if_version),
         # Compared before it came here, unless the type has changed since.
         :ok <- if(schema == new.schema, do: :ok, else: Types.check(schema, name, new.value)) do
      put = %{there: true, version: known.version + 1, value: new.value, type: new.type, size: new.size}
      plan = write(plan, name, Map.merge(put, %{restores: new.restores, at: plan.at, written: plan.now}))

      {:ok,
       %{
         plan
         | more: plan.more + if(known.there, do: 0, else: 1),
           new: plan.new + if(known.version == 0, do: 1, else: 0),
           bytes: plan.bytes + new.size - known.size
       }}
    end
  end

  defp one({:delete, name, if_version}, plan) do
    known = known(plan.tables, plan.id, name)

    with :ok <- check_version(name, known, if_version) do
      if known.there do
        put = %{there: false, version: known.version + 1, value: nil, type: nil, size: 0, restores: nil}
        plan = write(plan, name, Map.merge(put, %{at: plan.at, written: plan.now}))
        {:ok, %{plan | more: plan.more - 1, bytes: plan.bytes - known.size}}
      else
        # Deleted twice, or made and deleted by the same command.
        {:ok, put_in(plan.versions[name], known.version)}
      end
    end
  end

  defp one({:instance, record, nil}, plan) do
    case Tables.get(plan.tables, :instance, plan.id, record.ref) do
      {:ok, known} ->
        Error.error(:conflict, "session #{inspect(plan.id)} has an instance #{record.ref} already, of #{known.class}")

      :error ->
        record = complete(record, 1)

        with :ok <- check_unnamed(plan, record) do
          plan = put_instance(plan, record)
          {:ok, %{plan | more: plan.more + 1, bytes: plan.bytes + Tables.instance_size(record)}}
        end
    end
  end

  defp one({:instance, record, expected}, plan) do
    with {:ok, known} <- instance(plan.tables, plan.id, record.ref) do
      if known.version == expected do
        # Named meanwhile, perhaps: that is no change of its state.
        record = complete(%{record | name: known.name}, expected + 1)
        growth = Tables.instance_size(record) - Tables.instance_size(known)
        plan = put_instance(plan, Map.put(record, :cache, known.cache))
        {:ok, %{plan | bytes: plan.bytes + growth}}
      else
        Error.error(
          :conflict,
          "#{known.class} #{known.ref} was changed by another call (version #{expected} → #{known.version}) while " <>
            "this one ran"
        )
      end
    end
  end

  defp one({:delete_instance, ref}, plan) do
    with {:ok, known} <- instance(plan.tables, plan.id, ref) do
      plan = %{plan | facts: [{:instance_gone, plan.id, ref} | plan.facts]}
      {:ok, %{plan | more: plan.more - 1, bytes: plan.bytes - Tables.instance_size(known)}}
    end
  end

  defp write(plan, name, put) do
    %{plan | facts: [{:variable, plan.id, name, put} | plan.facts], versions: Map.put(plan.versions, name, put.version)}
  end

  defp put_instance(plan, record) do
    %{
      plan
      | facts: [{:instance, plan.id, record} | plan.facts],
        instances: Map.put(plan.instances, record.ref, record.version)
    }
  end

  defp complete(record, version) do
    %{ref: nil, class: nil, args: [], kwargs: %{}, state: nil, name: nil, methods: [], cache: nil}
    |> Map.merge(record)
    |> Map.put(:version, version)
  end

  @doc "An instance by its ref; `:not_found` names what there is."
  @spec instance(Tables.t(), String.t(), String.t()) :: {:ok, map()} | {:error, Error.t()}
  def instance(tables, id, ref) do
    with :error <- Tables.get(tables, :instance, id, ref) do
      missing(id, "instance", ref, Tables.names(tables, :instance, id))
    end
  end

  @doc "`:not_found`, naming what there is."
  @spec missing(String.t(), String.t(), String.t(), [String.t()]) :: {:error, Error.t()}
  def missing(id, kind, name, known) do
    there = known |> Enum.sort() |> Enum.take(20) |> Enum.join(", ")

    Error.error(:not_found, "session #{inspect(id)} has no #{kind} #{inspect(name)}",
      remedy: "There is: #{if there == "", do: "none", else: there}."
    )
  end

  @doc "`:conflict` if another instance has the name of this one."
  @spec check_unnamed(%{tables: Tables.t(), id: String.t()}, map()) :: :ok | {:error, Error.t()}
  def check_unnamed(_plan, %{name: name}) when name in [nil, ""], do: :ok

  def check_unnamed(plan, %{name: name, ref: ref}) do
    taken? = Enum.any?(Tables.all(plan.tables, :instance, plan.id), fn {_, it} -> it.name == name and it.ref != ref end)

    if taken? do
      Error.error(:conflict, "another instance of session #{inspect(plan.id)} is called #{inspect(name)}",
        remedy: "Rename that first."
      )
    else
      :ok
    end
  end

  @doc "How a variable is: never written is version 0."
  @spec known(Tables.t(), String.t(), String.t()) :: %{
          there: boolean(),
          version: non_neg_integer(),
          size: non_neg_integer()
        }
  def known(tables, id, name) do
    case Tables.put(tables, id, name) do
      {:ok, put} -> put
      :error -> unwritten()
    end
  end

  @spec unwritten() :: %{there: false, version: 0, size: 0}
  def unwritten, do: %{there: false, version: 0, size: 0}

  @doc "`:conflict` unless the variable is at that version (0: it is not there); nil asks for none."
  @spec check_version(String.t(), map(), non_neg_integer() | nil) :: :ok | {:error, Error.t()}
  def check_version(_name, _known, nil), do: :ok

  def check_version(name, known, if_version) do
    at = if known.there, do: known.version, else: 0

    if at == if_version do
      :ok
    else
      Error.error(
        :conflict,
        "variable #{inspect(name)} is at version #{at}, not #{if_version}: it was written meanwhile",
        remedy: "Read it again, and compute from that."
      )
    end
  end

  @doc "`:quota_exceeded` if the session could not hold so much more; `growth` has `more`, `new` (names), `bytes`."
  @spec check_quota(map(), map(), map()) :: :ok | {:error, Error.t()}
  def check_quota(quota, session, growth) do
    things = session.things + growth.more
    bytes = session.bytes + growth.bytes

    cond do
      growth.more > 0 and things > quota.things ->
        Error.error(
          :quota_exceeded,
          "session #{inspect(session.id)} would hold #{things} things, and may hold #{quota.things}"
        )

      growth.new > 0 and session.deleted >= quota.things ->
        Error.error(
          :quota_exceeded,
          "session #{inspect(session.id)} keeps the versions of #{session.deleted} deleted variables: as many as may be",
          remedy: "Use their names again, rather than new ones; or go on in a new session."
        )

      growth.bytes > 0 and bytes > quota.bytes ->
        Error.error(
          :quota_exceeded,
          "session #{inspect(session.id)} would hold #{bytes} bytes, and may hold #{quota.bytes}"
        )

      true ->
        :ok
    end
  end

  defp schema_of(tables, id, name) do
    case Tables.get(tables, :type, id, name) do
      {:ok, schema} -> schema
      :error -> nil
    end
  end
end
