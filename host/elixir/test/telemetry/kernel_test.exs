defmodule Bridge.Telemetry.KernelTest do
  # A kernel of flesh and blood: what it tells, and what the host tells of it.
  use ExUnit.Case, async: false

  alias Bridge.Telemetry
  alias Bridge.Telemetry.Catalogue

  setup do
    name = __MODULE__.Host
    start_supervised!({Bridge, name: name, kernels: 1, python: Bridge.TestKernels.python()})
    test = self()

    :ok =
      Telemetry.attach(__MODULE__, [:bridge], fn name, numbers, said, _ -> send(test, {:event, name, numbers, said}) end)

    on_exit(fn -> Telemetry.detach(__MODULE__) end)
    {:ok, session: %Bridge.Session{bridge: name, id: "demo"}, bridge: name}
  end

  test "all that a command and its tool tell is in the catalogue, and is one trace", %{session: session, bridge: bridge} do
    :ok = Bridge.Tools.register(session, "double", fn x -> 2 * x end, args: [:x])

    source = """
    def twice(ctx, tool, x):
        return tool(x) + ctx.call_tool("double", x=x)
    """

    assert :ok = Bridge.define(session, "twice", source)
    assert {:ok, 84} = Bridge.call(session, "twice", [Bridge.Tools.tool!(session, "double"), 21])

    # The kernel's own word comes after its answer.
    assert_receive {:event, [:bridge, :execution, :stop], %{callbacks: 2}, %{trace_id: trace}}, 60_000
    assert {:ok, waterfall} = Telemetry.waterfall(trace, bridge: bridge)

    callback = [{"tool.call double", 2}, {"tool double", 3}]
    assert [{"twice", 0}, {"kernel " <> _, 1} | within] = Enum.map(waterfall.spans, &{&1.label, &1.depth})
    assert within == callback ++ callback

    for event <- Telemetry.events(bridge) do
      assert Catalogue.problem(event.name, event.measurements, event.metadata) == nil
    end

    summary = Telemetry.summary(bridge)
    assert {summary.unknown, summary.refused} == {0, 0}
    assert [%{count: 1, kernel_p50: in_kernel}] = summary.latencies
    assert in_kernel > 0
    assert [%{state: :alive, commands: 1}] = summary.kernels
  end
end
