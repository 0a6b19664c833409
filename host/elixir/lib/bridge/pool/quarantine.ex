defmodule Bridge.Pool.Quarantine do
  @moduledoc false
  # The commands that ended every kernel they met. They are named, and not run again until let out. In a table that any
  # process reads: it is asked before each command.

  alias Bridge.Error

  @kept 1_000

  @type poison :: %{
          name: String.t(),
          session: String.t(),
          kernels: pos_integer(),
          last: String.t(),
          since: DateTime.t()
        }

  @doc "The table of a bridge, owned by whoever calls."
  @spec open(atom()) :: :ets.table()
  def open(table), do: :ets.new(table, [:named_table, :set, :public, read_concurrency: true])

  @doc "Whether that command may run."
  @spec check(atom(), binary()) :: :ok | {:error, Error.t()}
  def check(table, digest) do
    # Without a table there is no pool, which is for others to say.
    case :ets.whereis(table) != :undefined and :ets.lookup(table, digest) do
      [{_digest, _number, poison}] ->
        Error.error(:quarantined, "#{poison.name} is in quarantine: it ended #{poison.kernels} kernels",
          remedy: remedy(poison.name)
        )

      _ ->
        :ok
    end
  end

  @doc "Take a command in; the error that says so."
  @spec add(atom(), binary(), map()) :: Error.t()
  def add(table, digest, %{name: name, session: session, kernels: kernels, last: last}) do
    poison = %{name: name, session: session, kernels: kernels, last: last, since: DateTime.utc_now()}
    :ets.insert(table, {digest, System.unique_integer([:monotonic]), poison})

    if :ets.info(table, :size) > @kept do
      {oldest, _number, _poison} = Enum.min_by(:ets.tab2list(table), &elem(&1, 1))
      :ets.delete(table, oldest)
    end

    Error.new(:quarantined, "#{name} ended #{kernels} kernels, the last one with nothing else running on it: #{last}",
      remedy: remedy(name)
    )
  end

  @doc "Let every command of that name run again."
  @spec release(atom(), String.t()) :: :ok | {:error, Error.t()}
  def release(table, name) do
    case for {digest, _number, %{name: ^name}} <- list(table), do: digest do
      [] ->
        names = table |> poisons() |> Enum.map(& &1.name) |> Enum.uniq() |> Enum.sort()
        there = if names == [], do: "none", else: Enum.join(names, ", ")
        Error.error(:not_found, "no command #{inspect(name)} is in quarantine", remedy: "There is: #{there}.")

      digests ->
        Enum.each(digests, &:ets.delete(table, &1))
    end
  end

  @doc "What is in quarantine, the oldest first."
  @spec poisons(atom()) :: [poison()]
  def poisons(table), do: table |> list() |> Enum.sort_by(&elem(&1, 1)) |> Enum.map(&elem(&1, 2))

  defp list(table), do: if(:ets.whereis(table) == :undefined, do: [], else: :ets.tab2list(table))

  defp remedy(name), do: "Mend it, then let it out: Bridge.release(#{inspect(name)})."
end
