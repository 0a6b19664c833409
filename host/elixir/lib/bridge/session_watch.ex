defmodule Bridge.SessionWatch do
  @moduledoc false
  # What goes with a session when it goes and is not in its store: its tools, what its events may hold. Tells of both ends.

  use GenServer

  alias Bridge.{Config, SessionStore, Telemetry, Tools}

  @spec start_link(Config.t()) :: GenServer.on_start()
  def start_link(cfg), do: GenServer.start_link(__MODULE__, cfg)

  @impl true
  def init(cfg) do
    :ok = SessionStore.watch_sessions(cfg)
    {:ok, cfg}
  end

  @impl true
  def handle_info({:bridge_session, :made, id, _at}, cfg) do
    Telemetry.execute(cfg, [:bridge, :session, :start], %{system_time: System.system_time()}, %{session: id})
    {:noreply, cfg}
  end

  def handle_info({:bridge_session, :gone, id, at}, cfg) do
    Tools.forget(id, at, bridge: cfg.name)
    Telemetry.forget(id, bridge: cfg.name)
    said = %{session: id, reason: "deleted or expired"}
    Telemetry.execute(cfg, [:bridge, :session, :stop], %{system_time: System.system_time()}, said)
    {:noreply, cfg}
  end

  # A handler of telemetry, which is called here, may leave messages behind.
  def handle_info(_other, cfg), do: {:noreply, cfg}

  # A crash report says nothing of what is in here.
  @impl {:format_status, 1} in GenServer.behaviour_info(:callbacks)
  def format_status(status), do: Bridge.Private.status(status, __MODULE__)
end
