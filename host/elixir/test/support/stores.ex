defmodule Bridge.TestStores do
  @moduledoc "Stores without kernels, for tests of what they keep."

  alias Bridge.{Config, SessionStore}

  @doc """
  A store of its own, as the supervisor starts it; its `%Bridge.Config{}`. `clock:` and `compact_bytes:` go to the store,
  the rest to the configuration.
  """
  @spec start(keyword()) :: Config.t()
  def start(opts \\ []) do
    {inner, opts} = Keyword.split(opts, [:clock, :compact_bytes])
    name = Keyword.get_lazy(opts, :name, fn -> :"Bridge.TestStore#{System.unique_integer([:positive])}" end)
    cfg = struct!(%Config{name: name}, opts)
    {:ok, _pid} = ExUnit.Callbacks.start_supervised(%{id: name, start: {SessionStore, :start_link, [cfg, inner]}})
    Config.put(cfg)
    ExUnit.Callbacks.on_exit(fn -> Config.delete(cfg) end)
    cfg
  end

  @doc "Stops it as its supervisor would."
  @spec stop(Config.t()) :: :ok
  def stop(cfg), do: ExUnit.Callbacks.stop_supervised!(cfg.name)

  @doc "A clock that stands until it is moved: `{clock, move}`, both in milliseconds."
  @spec clock(integer()) :: {(() -> integer()), (integer() -> :ok)}
  def clock(start \\ 1_700_000_000_000) do
    time = :atomics.new(1, signed: true)
    :atomics.put(time, 1, start)
    {fn -> :atomics.get(time, 1) end, fn by -> :atomics.add(time, 1, by) end}
  end
end
