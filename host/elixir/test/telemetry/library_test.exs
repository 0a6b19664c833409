defmodule Bridge.Telemetry.LibraryTest do
  # Not async: the module that stands for :telemetry is there for the whole BEAM while these run.
  use ExUnit.Case, async: false

  alias Bridge.Telemetry

  setup context do
    # As much of :telemetry as Bridge calls, with its names and shapes.
    {:module, :telemetry, _code, _} =
      Module.create(
        :telemetry,
        quote do
          def attach_many(id, names, fun, config) do
            send(unquote(self()), {:attached, id, names, fun, config})
            :ok
          end

          def detach(id) do
            send(unquote(self()), {:detached, id})
            {:error, :not_found}
          end

          def execute(name, measurements, metadata) do
            send(unquote(self()), {:executed, name, measurements, metadata})
            :ok
          end
        end,
        Macro.Env.location(__ENV__)
      )

    on_exit(fn ->
      :code.delete(:telemetry)
      :code.purge(:telemetry)
    end)

    name = Module.concat(__MODULE__, "B#{context.line}")
    start_supervised!({Telemetry, %{name: name}})
    {:ok, bridge: name}
  end

  test "every event goes through :telemetry, the kernels' too", %{bridge: bridge} do
    Telemetry.execute(bridge, [:bridge, :pool, :scale], %{before: 1, wanted: 2}, %{reason: "asked"})
    assert_received {:executed, [:bridge, :pool, :scale], %{before: 1, wanted: 2}, %{reason: "asked", bridge: ^bridge}}

    progress = %{"name" => ["bridge", "user", "x"], "measurements" => %{}, "metadata" => %{}}
    Telemetry.ingest(bridge, [%{"metadata" => %{}, "events" => [progress]}], "k")
    assert_received {:executed, [:bridge, :user], %{}, %{name: "x", kernel: "k"}}
    assert length(Telemetry.events(bridge)) == 2
  end

  test "handlers are its own: the beginning of a name is all events that have it" do
    fun = fn _, _, _, _ -> :ok end
    assert :ok = Telemetry.attach("mine", [:bridge, :session], fun, :config)
    assert_received {:attached, "mine", [[:bridge, :session, :start], [:bridge, :session, :stop]], ^fun, :config}
    assert {:error, :not_found} = Telemetry.detach("mine")
    assert_received {:detached, "mine"}
    assert Bridge.Telemetry.Handlers.list([]) == []
  end

  test "what is switched off does not reach it", %{bridge: bridge} do
    :ok = Telemetry.disable([:bridge, :pool], bridge: bridge)
    Telemetry.execute(bridge, [:bridge, :pool, :scale], %{before: 1, wanted: 2}, %{reason: "asked"})
    refute_received {:executed, _, _, _}
  end
end
