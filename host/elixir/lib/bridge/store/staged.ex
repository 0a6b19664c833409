defmodule Bridge.Store.Staged do
  @moduledoc """
  What one attempt at a command has written, seen by that command alone until it commits. A plain value.

      staged = Bridge.Store.Staged.new()
      {:ok, version, staged} = Bridge.Store.Staged.set(staged, cfg, "demo", "n", 1, nil)
      {:ok, 1, ^version} = Bridge.Store.Staged.fetch(staged, cfg, "demo", "n")
      Bridge.SessionStore.commit(cfg, command_id, "demo", Bridge.Store.Staged.ops(staged))

  Each write is checked at once, and again at the commit for what changed meanwhile.
  """

  alias Bridge.{Error, SessionStore}
  alias Bridge.Store.{Commit, Plain, Tables, Types}

  @enforce_keys [:writes, :growth, :total, :order]
  defstruct @enforce_keys

  @opaque t :: %__MODULE__{}

  @nothing %{more: 0, new: 0, bytes: 0}

  @spec new() :: t()
  def new, do: %__MODULE__{writes: %{}, growth: %{}, total: @nothing, order: []}

  @doc "The version that it becomes if nobody else writes it first."
  @spec set(t(), struct(), String.t(), String.t(), term(), non_neg_integer() | nil) ::
          {:ok, pos_integer(), t()} | {:error, Error.t()}
  def set(%__MODULE__{} = staged, cfg, session, name, value, if_version) do
    tables = SessionStore.tables!(cfg)
    size = :erlang.external_size(value)

    with {:ok, known} <- session(tables, session),
         :ok <- Plain.check_name("variable", name),
         :ok <- Types.check(type(tables, session, name), name, value),
         {:ok, write} <- stage(staged, tables, session, name, if_version) do
      at = Commit.known(tables, session, name)
      more = if at.there, do: 0, else: 1
      growth = %{more: more, new: if(at.version == 0, do: 1, else: 0), bytes: size - at.size}
      staged = put(staged, name, Map.merge(write, %{there: true, value: value, size: size}), growth)

      with :ok <- Commit.check_quota(tables.quota, known, staged.total), do: {:ok, write.version, staged}
    end
  end

  @doc "`:not_found` if it is not there, or not any more."
  @spec delete(t(), struct(), String.t(), String.t(), non_neg_integer() | nil) :: {:ok, t()} | {:error, Error.t()}
  def delete(%__MODULE__{} = staged, cfg, session, name, if_version) do
    tables = SessionStore.tables!(cfg)

    with {:ok, _known} <- session(tables, session),
         {:ok, _value, _version} <- found(staged, cfg, tables, session, name),
         {:ok, write} <- stage(staged, tables, session, name, if_version) do
      at = Commit.known(tables, session, name)
      growth = if at.there, do: %{more: -1, new: 0, bytes: -at.size}, else: @nothing
      {:ok, put(staged, name, Map.merge(write, %{there: false, value: nil, size: 0}), growth)}
    end
  end

  @doc "A variable as the command sees it: as it wrote it, else as the session has it."
  @spec fetch(t(), struct(), String.t(), String.t()) :: {:ok, term(), pos_integer()} | :error
  def fetch(%__MODULE__{} = staged, cfg, session, name) do
    case staged.writes do
      %{^name => %{there: true} = write} -> {:ok, write.value, write.version}
      %{^name => _deleted} -> :error
      %{} -> SessionStore.fetch(cfg, session, name)
    end
  end

  @doc "Those that exist, each with its version, as the command sees them: of the session's, as they were at one moment."
  @spec fetch_many(t(), struct(), String.t(), [String.t()]) :: %{String.t() => {term(), pos_integer()}}
  def fetch_many(%__MODULE__{} = staged, cfg, session, names) do
    {own, others} = Enum.split_with(names, &is_map_key(staged.writes, &1))
    found = SessionStore.fetch_many(cfg, session, others)

    for name <- own, %{there: true} = write <- [staged.writes[name]], into: found do
      {name, {write.value, write.version}}
    end
  end

  @doc "The session's variables as the command sees them, as `Bridge.SessionStore.list/2` has them."
  @spec list(t(), struct(), String.t()) :: [map()]
  def list(%__MODULE__{} = staged, cfg, session) do
    there = Enum.reject(SessionStore.list(cfg, session), &Map.has_key?(staged.writes, &1.name))

    own =
      for {name, %{there: true} = write} <- staged.writes do
        %{name: name, version: write.version, type: Plain.type_name(write.value), size: write.size}
      end

    Enum.sort_by(there ++ own, & &1.name)
  end

  @doc "What to commit."
  @spec ops(t()) :: [Commit.op()]
  def ops(%__MODULE__{} = staged) do
    for name <- Enum.reverse(staged.order) do
      case Map.fetch!(staged.writes, name) do
        %{there: true} = write -> {:set, name, write.value, write.if_version}
        write -> {:delete, name, write.if_version}
      end
    end
  end

  defp session(tables, id), do: Commit.session(tables, id)

  defp found(staged, cfg, tables, session, name) do
    with :error <- fetch(staged, cfg, session, name) do
      if Map.has_key?(staged.writes, name) do
        Error.error(:not_found, "variable #{inspect(name)} was deleted by this command")
      else
        Commit.missing(session, "variable", name, Enum.map(Tables.list(tables, session), & &1.name))
      end
    end
  end

  defp stage(staged, tables, session, name, if_version) do
    case staged.writes do
      %{^name => earlier} ->
        at = if earlier.there, do: earlier.version, else: 0

        if if_version in [nil, at] do
          {:ok, Map.take(earlier, [:version, :if_version])}
        else
          Error.error(:conflict, "this command itself has written variable #{inspect(name)}: it is at version #{at}")
        end

      %{} ->
        known = Commit.known(tables, session, name)

        with :ok <- Commit.check_version(name, known, if_version) do
          {:ok, %{version: known.version + 1, if_version: if_version}}
        end
    end
  end

  defp put(staged, name, write, growth) do
    order = if Map.has_key?(staged.writes, name), do: staged.order, else: [name | staged.order]
    earlier = Map.get(staged.growth, name, @nothing)
    # This write's in place of an earlier one of the same name.
    total = Map.new(staged.total, fn {kind, sum} -> {kind, sum + growth[kind] - earlier[kind]} end)

    %{
      staged
      | writes: Map.put(staged.writes, name, write),
        growth: Map.put(staged.growth, name, growth),
        total: total,
        order: order
    }
  end

  defp type(tables, session, name) do
    case Tables.get(tables, :type, session, name) do
      {:ok, schema} -> schema
      :error -> nil
    end
  end
end
