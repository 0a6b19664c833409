defmodule Bridge.Supervisor do
  @moduledoc false
  # The processes of one bridge, in the order in which they need each other: if one is started anew, so are those that
  # were started after it, for they lean on what it held.

  use Supervisor

  alias Bridge.Config

  @spec start_link(Config.t()) :: Supervisor.on_start()
  def start_link(%Config{} = cfg), do: Supervisor.start_link(__MODULE__, cfg, name: cfg.name)

  @impl true
  def init(cfg) do
    children = [
      {Bridge.Runtime, cfg},
      {Bridge.Telemetry, cfg},
      {Bridge.SessionStore, cfg},
      {Bridge.Tools, cfg},
      {Bridge.SessionWatch, cfg},
      {Registry, keys: :unique, name: Config.process(cfg.name, :keys)},
      {Bridge.Pool, cfg},
      Supervisor.child_spec({Task.Supervisor, name: Config.process(cfg.name, :tool_tasks)}, id: :tool_tasks),
      {Bridge.Kernels, cfg},
      Supervisor.child_spec({DynamicSupervisor, name: Config.process(cfg.name, :commands)}, id: :commands)
    ]

    Supervisor.init(children, strategy: :rest_for_one)
  end
end
