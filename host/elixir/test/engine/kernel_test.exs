defmodule Bridge.KernelTest do
  # Kernels that do not keep to the contract (`hostile_kernel.py`), and how many kernels there are.
  use ExUnit.Case, async: true

  import Bridge.TestProcesses

  alias Bridge.{Error, Kernels, Telemetry}

  setup do
    directory = Path.join(System.tmp_dir!(), "hostile-#{System.pid()}-#{System.unique_integer([:positive])}")
    File.mkdir_p!(directory)
    on_exit(fn -> File.rm_rf!(directory) end)
    {:ok, tmp_dir: directory}
  end

  # In place of Python: what is started instead of a kernel.
  defp hostile(directory) do
    path = Path.join(directory, "python")
    script = Path.join(__DIR__, "hostile_kernel.py")
    File.write!(path, "#!/bin/sh\nexec #{Bridge.TestKernels.python()} #{script} \"$@\"\n")
    File.chmod!(path, 0o700)
    path
  end

  defp hosted(directory, opts \\ []) do
    %{name: name} = bridge(opts ++ [python: hostile(directory)])
    name
  end

  defp call(bridge, name, opts \\ []), do: Bridge.call("s", name, [], [bridge: bridge, deadline: 60_000] ++ opts)
  defp pids(bridge), do: for(%{pid: pid} <- ready(bridge, 1), do: pid)

  test "an answer that does not fit the contract is an error for its caller, and harms nobody else", %{tmp_dir: dir} do
    bridge = hosted(dir)
    before = pids(bridge)

    for name <- ~w(no_value a_list both bad_error unknown_code bad_value) do
      assert {:error, %Error{name: error}} = call(bridge, name)
      assert error in [:internal_error, :malformed_value], name
    end

    assert {:ok, 1} = call(bridge, "good")

    assert {:error, %Error{name: :internal_error}} =
             Bridge.inspect_object("x", session: "s", bridge: bridge, deadline: 60_000)

    for class <- ~w(no_state no_value bad_state bad_digest) do
      create = [session: "s", bridge: bridge, deadline: 60_000]
      assert {:error, %Error{name: :internal_error}} = Bridge.create_instance(class, [], create)
    end

    assert {:ok, []} = Bridge.instances("s", bridge: bridge)
    assert {:ok, 1} = call(bridge, "twice")
    assert {:ok, 1} = call(bridge, "good")
    assert pids(bridge) == before
    assert Bridge.status!(bridge: bridge).running == 0
  end

  test "kernels that take the shortest messages there are serve, and live" do
    %{name: bridge} = bridge(arguments: ["--Policy.max_message_bytes=65536"], heartbeat: 2_000)
    [%{pid: pid}] = ready(bridge, 1)
    assert {:ok, 5.0} = Bridge.call("s", "math.hypot", [3, 4], bridge: bridge)
    eventually("it was pinged", fn -> Telemetry.events(bridge, [:bridge, :kernel, :memory]) != [] end)
    assert %{} = Bridge.stats!(bridge: bridge) |> Map.values() |> hd()
    assert [%{pid: ^pid}] = Bridge.kernels!(bridge: bridge)

    assert {:error, %Error{name: :limit_exceeded}} =
             Bridge.call("s", "builtins.len", [String.duplicate("x", 65_536)], bridge: bridge)
  end

  test "callbacks that are none are refused, each of them", %{tmp_dir: dir} do
    assert {:ok, "answered"} = dir |> hosted() |> call("odd_callbacks")
  end

  test "noise is dropped: the command that made it, and the kernel's process, go on", %{tmp_dir: dir} do
    bridge = hosted(dir, on_output: fn _output -> :ok end)
    before = pids(bridge)
    for _ <- 1..3, do: assert({:ok, 1} = call(bridge, "noise"))
    assert pids(bridge) == before
  end

  test "a stream that sends more than it has credit for is refused", %{tmp_dir: dir} do
    bridge = hosted(dir)

    for name <- ~w(greedy chunk_without_value chunk_out_of_turn) do
      stream = Bridge.stream("s", name, [], bridge: bridge, deadline: 60_000)
      # Read when all of it is there.
      slowly = Stream.each(stream, fn _value -> assert {:ok, 1} = call(bridge, "good") end)
      assert_raise Error, ~r/credit|was due/, fn -> Stream.run(slowly) end
    end

    assert {:ok, 1} = call(bridge, "good")
    assert {:messages, []} = Process.info(self(), :messages)
  end

  test "what a kernel answers as it closes the connection is heard, and nobody waits for the rest", %{tmp_dir: dir} do
    bridge = hosted(dir)
    assert {:ok, attempt} = call(bridge, "closes_and_answers")
    assert attempt in [1, 2]
    # Another one has taken its place.
    assert {:ok, 1} = call(bridge, "good")
  end

  test "a kernel that ends at once is told to who called, and another is started", %{tmp_dir: dir} do
    bridge = hosted(dir)
    assert {:error, %Error{name: :kernel_died, message: message}} = call(bridge, "dies", retries: 0)
    assert message =~ "exit code 3"
    assert {:ok, 1} = call(bridge, "good")
  end

  test "a command that meets a kernel's process that has just gone runs on another, and that is no death of it", %{
    tmp_dir: dir
  } do
    bridge = hosted(dir, kernels: 2)
    ready(bridge, 2)

    for _ <- 1..5 do
      [victim | _] = ready(bridge, 2)
      :erlang.suspend_process(victim.pid)
      # As many as both get some.
      callers = for _ <- 1..20, do: Task.async(fn -> call(bridge, "good", retries: 1) end)

      eventually("one of them has it", fn ->
        Enum.any?(Bridge.kernels!(bridge: bridge), &(&1.pid == victim.pid and &1.in_flight > 0))
      end)

      Process.exit(victim.pid, :kill)
      assert Enum.uniq(Task.await_many(callers, 60_000)) == [{:ok, 1}]
    end
  end

  test "a handler of telemetry that sends a command is told that it cannot, instead of waiting for itself" do
    %{name: bridge} = bridge(kernels: 1)
    test = self()
    # This event is told in the process that has the kernel.
    handler = fn _event, _numbers, said, _config ->
      if said.bridge == bridge and said.subject == "math.hypot", do: send(test, {:told, call(bridge, "math.hypot")})
    end

    :ok = Telemetry.attach({__MODULE__, bridge}, [:bridge, :execution, :stop], handler)
    on_exit(fn -> Telemetry.detach({__MODULE__, bridge}) end)
    assert {:ok, 5.0} = Bridge.call("s", "math.hypot", [3, 4], bridge: bridge)
    assert_receive {:told, {:error, %Error{name: :invalid_params}}}, 60_000
  end

  test "however many ask at once for so many kernels, there are as many" do
    %{name: bridge} = bridge(kernels: 0, python: "no such python")
    {:ok, cfg} = Bridge.Config.fetch(bridge)

    for wanted <- [3, 1, 2] do
      callers = for _ <- 1..16, do: Task.async(fn -> Bridge.scale(wanted, bridge: bridge) end)
      assert Enum.uniq(Task.await_many(callers, 60_000)) == [:ok]
      assert length(Kernels.pids(cfg)) == wanted
    end
  end

  test "kernels that are on their way out finish what they run, however often fewer are asked for, and are not counted" do
    %{name: bridge} = bridge(kernels: 2)
    [_, _] = ready(bridge, 2)
    {:ok, cfg} = Bridge.Config.fetch(bridge)
    test = self()

    held = fn ->
      send(test, {:held, self()})
      receive do: (:go_on -> 1)
    end

    :ok = Bridge.Tools.register("s", "held", held, bridge: bridge)
    :ok = Bridge.define("s", "f", "def f(ctx):\n    return ctx.call_tool('held')", bridge: bridge)
    running = for _ <- 1..8, do: Task.async(fn -> Bridge.call("s", "f", [], bridge: bridge, retries: 0) end)
    tools = for _ <- running, do: assert_receive({:held, _pid}, 60_000) |> elem(1)

    for _ <- 1..3, do: assert(:ok = Bridge.scale(1, bridge: bridge))
    assert length(Kernels.pids(cfg)) == 1
    assert :ok = Bridge.scale(2, bridge: bridge)
    assert length(Kernels.pids(cfg)) == 2

    Enum.each(tools, &send(&1, :go_on))
    assert Enum.uniq(Task.await_many(running, 60_000)) == [{:ok, 1}]

    eventually("the one has gone", fn ->
      length(DynamicSupervisor.which_children(Bridge.Config.process(bridge, :kernels))) == 2
    end)

    ready(bridge, 2)
    assert length(Kernels.pids(cfg)) == 2
  end
end
