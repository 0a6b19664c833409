defmodule Bridge.Pool.Kinds do
  @moduledoc false
  # Which commands compute and which wait, wherever they run: one value for all kernels of a pool.
  #
  # One waits if its durations stay the same however many commands are beside it. That is judged by the number of these
  # alone, whatever kind they are: who took the kinds for granted would never find out that they are wrong. So what waits
  # for an uncertain time counts as computing, which is the safe side: then it is as if only the number counted.

  alias Bridge.Pool.Recent

  # Durations stay the same if they are that far from the usual, in the mean of squares.
  @steady 0.05
  @weight 0.03
  @least_runs 30
  @most_commands 4096

  @opaque t :: Recent.t()

  @spec new() :: t()
  def new, do: Recent.new(@most_commands)

  @doc "Of the newest duration in what is usual, once there are many."
  @spec weight() :: float()
  def weight, do: @weight

  @doc "Whether the command is known to wait rather than compute."
  @spec waits?(t(), String.t()) :: boolean()
  def waits?(kinds, command) do
    case Recent.get(kinds, command) do
      %{waits: waits} -> waits
      nil -> false
    end
  end

  @doc "It took `longer` than usual beside `fuller` than usual, both as shares of the usual."
  @spec add(t(), String.t(), float(), float()) :: t()
  def add(kinds, command, longer, fuller) do
    kind = Recent.get(kinds, command) || %{runs: 0, spread: 0.0, crowding: 0.0, waits: false}
    runs = kind.runs + 1
    weight = max(@weight, 1 / runs)
    spread = kind.spread + weight * (longer * longer - kind.spread)
    crowding = kind.crowding + weight * (fuller * fuller - kind.crowding)

    waits =
      if kind.waits,
        do: spread < 2 * @steady and spread < 1.2 * crowding,
        else: runs >= @least_runs and spread < @steady and spread < crowding / 1.5

    Recent.put(kinds, command, %{runs: runs, spread: spread, crowding: crowding, waits: waits})
  end
end
