defmodule Bridge.Kernels do
  @moduledoc false
  # The places for kernels, a process each: as many as are wanted. A kernel that dies is started anew by its own place;
  # the supervisor is for a place that fails itself.

  use DynamicSupervisor

  alias Bridge.{Config, Error, Telemetry}

  @spec start_link(Config.t()) :: Supervisor.on_start()
  def start_link(cfg) do
    with {:ok, pid} <- DynamicSupervisor.start_link(__MODULE__, cfg, name: Config.process(cfg.name, :kernels)) do
      Enum.each(1..cfg.kernels//1, fn _ -> add(cfg) end)
      {:ok, pid}
    end
  end

  @impl true
  # Several kernels may meet the same trouble at once; one that fails for ever is held back by its own place.
  def init(cfg) do
    # Those that are on their way out: they count no more.
    :ets.new(Config.process(cfg.name, :kernels), [:named_table, :public])
    DynamicSupervisor.init(strategy: :one_for_one, max_restarts: 10 + 3 * cfg.kernels, max_seconds: 10)
  end

  @spec add(Config.t()) :: {:ok, pid()} | {:error, Error.t()}
  def add(cfg) do
    child = {Bridge.Kernel, {cfg, System.unique_integer([:positive, :monotonic])}}

    case DynamicSupervisor.start_child(Config.process(cfg.name, :kernels), child) do
      {:ok, pid} -> {:ok, pid}
      {:error, reason} -> Error.error(:kernel_start_failed, inspect(reason))
    end
  end

  @doc "Those that are to stay."
  @spec pids(Config.t()) :: [pid()]
  def pids(cfg) do
    table = Config.process(cfg.name, :kernels)
    there = for {_, pid, _, _} <- DynamicSupervisor.which_children(table), is_pid(pid), do: pid
    for {pid} <- :ets.tab2list(table), pid not in there, do: :ets.delete(table, pid)
    Enum.reject(there, &:ets.member(table, &1))
  end

  defp retire(cfg, pid) do
    :ets.insert(Config.process(cfg.name, :kernels), {pid})
    Bridge.Kernel.retire(pid)
  end

  @doc "As many places as `count`: more are started, too many finish what runs there and go."
  @spec scale(Config.t(), non_neg_integer()) :: :ok | {:error, Error.t()}
  # Two that count at once would both make up for what is missing.
  def scale(cfg, count) do
    :global.trans({{__MODULE__, cfg.name}, self()}, fn -> scale_to(cfg, count) end, [node()])
  catch
    :exit, {reason, _call} when reason in [:noproc, :normal, :shutdown] ->
      Error.error(:host_closed, "#{inspect(cfg.name)} is not running")
  end

  defp scale_to(cfg, count) do
    pids = pids(cfg)
    before = length(pids)

    if count != before do
      measured = %{before: before, wanted: count}
      Telemetry.execute(cfg, [:bridge, :pool, :scale], measured, %{reason: "scale"})
    end

    pids |> Enum.drop(count) |> Enum.each(&retire(cfg, &1))

    Enum.reduce_while(1..max(count - before, 0)//1, :ok, fn _, :ok ->
      case add(cfg) do
        {:ok, _pid} -> {:cont, :ok}
        {:error, error} -> {:halt, {:error, error}}
      end
    end)
  end
end
