defmodule Bridge.Runtime do
  @moduledoc false
  # What there is as long as a bridge runs: its configuration where everybody finds it, and its directory, which only its
  # user can look into.

  use GenServer

  alias Bridge.Config

  @spec start_link(Config.t()) :: GenServer.on_start()
  def start_link(cfg), do: GenServer.start_link(__MODULE__, cfg, name: Config.process(cfg.name, :owner))

  @impl true
  def init(cfg) do
    Process.flag(:trap_exit, true)

    # Left by a life of this process that was killed. Of somebody else's nothing can be removed, and it is not made.
    _ = File.rm_rf(cfg.runtime_dir)

    with :ok <- File.mkdir(cfg.runtime_dir), :ok <- File.chmod(cfg.runtime_dir, 0o700) do
      Config.put(cfg)
      {:ok, cfg}
    else
      {:error, reason} ->
        {:stop,
         Bridge.Error.new(:kernel_start_failed, "#{cfg.runtime_dir} cannot be made: #{:file.format_error(reason)}",
           remedy: "See to that directory (space, permissions), or set TMPDIR to another."
         )}
    end
  end

  # A crash report says nothing of what is in here.
  @impl {:format_status, 1} in GenServer.behaviour_info(:callbacks)
  def format_status(status), do: Bridge.Private.status(status, __MODULE__)

  @impl true
  def terminate(_reason, cfg) do
    Config.delete(cfg)
    File.rm_rf(cfg.runtime_dir)
  end
end
