defmodule Bridge.OtpTest do
  use ExUnit.Case, async: true

  import Bridge.TestProcesses

  alias Bridge.{Config, Error, SessionStore, Tools}

  # Calls a tool, so that the test knows that it runs, and goes on when that has answered.
  @held """
  def held(ctx, path=None):
      ctx.call_tool("arrived")
      ctx["held"] = True
      if path is not None:
          import os, time
          while not os.path.exists(path):
              time.sleep(0.005)
      return "done"
  """

  defp scratch do
    path = Path.join(System.tmp_dir!(), "otp-#{System.pid()}-#{System.unique_integer([:positive])}")
    File.mkdir_p!(path)
    on_exit(fn -> File.rm_rf!(path) end)
    path
  end

  # In session "s": `held`, whose tool tells this process and waits to be told to go on.
  defp furnish(bridge) do
    test = self()
    :ok = Bridge.define("s", "held", @held, bridge: bridge)

    :ok =
      Tools.register(
        "s",
        "arrived",
        fn ->
          send(test, {:arrived, self()})
          receive do: (:go_on -> nil)
        end,
        bridge: bridge
      )
  end

  defp children(bridge), do: Map.new(Supervisor.which_children(bridge), fn {id, pid, _, _} -> {id, pid} end)
  defp runtime_dir(bridge), do: bridge |> Config.fetch() |> elem(1) |> Map.fetch!(:runtime_dir)

  defp working(bridge) do
    eventually("a kernel has a command", fn ->
      Enum.find(Bridge.kernels!(bridge: bridge), &(&1.in_flight > 0))
    end)
  end

  # -- kernels ----------------------------------------------------------------------------------

  test "a kernel that is killed is replaced, and nothing else is started anew" do
    %{name: bridge} = bridge(kernels: 2)
    [killed, other] = ready(bridge, 2)
    before = children(bridge)
    signal(killed.os_pid, "KILL")

    eventually("there is another in its place", fn ->
      kernels = Bridge.kernels!(bridge: bridge)
      length(kernels) == 2 and killed.os_pid not in Enum.map(kernels, & &1.os_pid)
    end)

    same = Enum.find(Bridge.kernels!(bridge: bridge), &(&1.id == other.id))
    assert {same.pid, same.os_pid} == {other.pid, other.os_pid}
    assert children(bridge) == before
    assert {:ok, 5.0} = Bridge.call("s", "math.hypot", [3, 4], bridge: bridge)
  end

  for {how, crash} <- [
        {"is killed", quote(do: &Process.exit(&1, :kill))},
        {"crashes", quote(do: &GenServer.cast(&1, :nobody_knows_this))}
      ] do
    test "a kernel's process that #{how} is started anew; its Python is gone, its command goes on elsewhere" do
      %{name: bridge, mark: mark} = bridge(kernels: 1)
      [%{pid: pid, os_pid: os_pid}] = ready(bridge, 1)
      before = children(bridge)
      furnish(bridge)
      path = Path.join(scratch(), "go-on")
      command = Task.async(fn -> Bridge.call("s", "held", [path], bridge: bridge) end)
      assert_receive {:arrived, tool}, 60_000
      send(tool, :go_on)
      eventually("the write has come", fn -> match?([%{in_flight: 1}], Bridge.kernels!(bridge: bridge)) end)

      unquote(crash).(pid)
      eventually("its Python has ended", fn -> not alive?(os_pid) end)
      File.write!(path, "")
      assert Task.await(command, 60_000) == {:ok, "done"}
      # The tool's reply came from the journal.
      refute_received {:arrived, _again}

      [next] = ready(bridge, 1)
      assert next.pid != pid and Process.alive?(next.pid)
      assert marked(mark) == [next.os_pid]
      assert children(bridge) == before
    end
  end

  test "a kernel that is stopped is killed when its heartbeat is missed, and its command goes on elsewhere" do
    %{name: bridge} = bridge(kernels: 2, heartbeat: 2_000)
    ready(bridge, 2)
    furnish(bridge)
    command = Task.async(fn -> Bridge.call("s", "held", [], bridge: bridge) end)
    assert_receive {:arrived, tool}, 60_000
    %{id: id, os_pid: os_pid} = working(bridge)
    signal(os_pid, "STOP")
    send(tool, :go_on)
    assert Task.await(command, 60_000) == {:ok, "done"}
    refute_received {:arrived, _again}
    eventually("it has ended", fn -> not alive?(os_pid) end)
    refute id in Enum.map(ready(bridge, 2), & &1.id)
  end

  test "a machine that stood still for longer than a heartbeat gives up no kernel" do
    # Between the two signals and the two calls that hold the process there is time on a busy machine: it counts.
    %{name: bridge} = bridge(kernels: 1, heartbeat: 5_000)
    [%{id: id, pid: pid, os_pid: os_pid}] = ready(bridge, 1)
    # Both at once, with a ping under way.
    signal(os_pid, "STOP")
    eventually("it was pinged", fn -> :sys.get_state(pid).pinged end)
    true = :erlang.suspend_process(pid)
    until = System.monotonic_time(:millisecond) + 6_000
    eventually("it has stood still", fn -> System.monotonic_time(:millisecond) > until end)
    true = :erlang.resume_process(pid)
    signal(os_pid, "CONT")
    assert {:ok, 5.0} = Bridge.call("s", "math.hypot", [3, 4], bridge: bridge, retries: 0)
    assert [%{id: ^id}] = ready(bridge, 1)
  end

  test "nor is its heartbeat forgotten while it is written to" do
    %{name: bridge} = bridge(kernels: 1, heartbeat: 2_000)
    [%{os_pid: os_pid}] = ready(bridge, 1)
    signal(os_pid, "STOP")
    # More than a socket takes. The deadline is shorter than the longest that a socket is waited for.
    large = String.duplicate("x", 20_000_000)
    assert Bridge.call("s", "builtins.len", [large], bridge: bridge, deadline: 25_000) == {:ok, 20_000_000}
    refute alive?(os_pid)
  end

  test "kernels that cannot be started are an error for each caller at once, until they can be" do
    python = Path.join(scratch(), "python")
    %{name: bridge} = bridge(kernels: 2, python: python)
    before = children(bridge)

    for _ <- 1..3 do
      assert {:error, %Error{name: :kernel_start_failed} = error} =
               Bridge.call("s", "math.hypot", [3, 4], bridge: bridge)

      assert error.message =~ python
      assert error.remedy =~ "python:"
    end

    # Written beside and moved: half of it is not to be started.
    File.write!(python <> "-", "#!/bin/sh\nexec #{Bridge.TestKernels.python()} \"$@\"\n")
    File.chmod!(python <> "-", 0o700)
    File.rename!(python <> "-", python)

    eventually("a command gets an answer", fn ->
      Bridge.call("s", "math.hypot", [3, 4], bridge: bridge) == {:ok, 5.0}
    end)

    assert children(bridge) == before
  end

  test "a command with a key that is held back when its kernel has died goes on later, its tools not called again" do
    %{name: bridge} = bridge(kernels: 1, breaker: %{command_failures: 1, kernel_failures: 1, cooldown: 1_000})
    [%{os_pid: os_pid}] = ready(bridge, 1)
    furnish(bridge)
    path = Path.join(scratch(), "go-on")
    command = Task.async(fn -> Bridge.call("s", "held", [path], bridge: bridge, idempotency_key: "once") end)
    assert_receive {:arrived, tool}, 60_000
    send(tool, :go_on)
    # The reply has come, and been used.
    eventually("the write has come", fn -> match?([%{in_flight: 1}], Bridge.kernels!(bridge: bridge)) end)
    eventually("its tool has ended", fn -> not Process.alive?(tool) end)
    signal(os_pid, "KILL")
    assert {:error, %Error{name: :circuit_open}} = Task.await(command, 60_000)
    File.write!(path, "")

    again = fn -> Bridge.call("s", "held", [path], bridge: bridge, idempotency_key: "once") end

    call =
      Task.async(fn ->
        eventually("it is let through", fn -> with({:error, %{name: :circuit_open}} <- again.(), do: nil) end)
      end)

    assert Task.await(call, 90_000) == {:ok, "done"}
    refute_received {:arrived, _again}
  end

  # -- the tree ---------------------------------------------------------------------------------

  test "if the store's owner is killed, what leans on it is started anew; what was on disk is there" do
    %{name: bridge, mark: mark} = bridge(kernels: 1, store: Path.join(scratch(), "store"))
    [%{os_pid: os_pid}] = ready(bridge, 1)
    furnish(bridge)
    {:ok, _} = SessionStore.set_variable("s", "kept", [1, 2], bridge: bridge)
    before = children(bridge)
    command = Task.async(fn -> Bridge.call("s", "held", [], bridge: bridge) end)
    assert_receive {:arrived, _tool}, 60_000
    Process.exit(Process.whereis(Config.process(bridge, :store)), :kill)

    # Its caller is told, and does not wait for what never comes.
    assert {:error, %Error{name: :host_closed}} = Task.await(command, 60_000)
    [%{os_pid: another}] = eventually("it is up again", fn -> up(bridge, before) end)
    assert SessionStore.get_variable("s", "kept", bridge: bridge) == {:ok, [1, 2]}
    assert {:ok, [%{subject: "held"}]} = Bridge.interrupted(bridge: bridge)
    assert {:ok, 5.0} = Bridge.call("s", "math.hypot", [3, 4], bridge: bridge)
    eventually("the kernel of before is gone", fn -> not alive?(os_pid) end)
    assert marked(mark) == [another]

    now = children(bridge)
    assert now[Bridge.Runtime] == before[Bridge.Runtime]
    assert now[Bridge.Telemetry] == before[Bridge.Telemetry]
    same = for {id, pid} <- now, before[id] == pid, do: id
    assert Enum.sort(same) == Enum.sort([Bridge.Runtime, Bridge.Telemetry])
    assert map_size(now) == map_size(before)
  end

  # The kernels, if what was started anew is up and one is ready.
  defp up(bridge, before) do
    pool = Process.whereis(Config.process(bridge, :pool))

    with true <- pool not in [nil, before[Bridge.Pool]], {:ok, %{kernels: [_ | _] = kernels}} <- status(bridge) do
      kernels
    else
      _not_yet -> nil
    end
  end

  test "if the owner of a bridge's directory is killed, all is started anew, in a directory of that name" do
    %{name: bridge} = bridge(kernels: 1)
    [%{id: before}] = ready(bridge, 1)
    directory = runtime_dir(bridge)
    top = Process.whereis(bridge)
    owner = Process.whereis(Config.process(bridge, :owner))
    Process.exit(owner, :kill)

    eventually("another one is there", fn ->
      Process.whereis(Config.process(bridge, :commands)) && Process.whereis(Config.process(bridge, :owner)) != owner
    end)

    assert [%{id: id}] = ready(bridge, 1)
    assert id != before
    assert {:ok, 5.0} = Bridge.call("s", "math.hypot", [3, 4], bridge: bridge)
    assert Process.whereis(bridge) == top
    assert runtime_dir(bridge) == directory
    assert File.stat!(directory).mode |> Bitwise.band(0o777) == 0o700
  end

  test "two bridges know nothing of each other, and one is stopped without the other" do
    %{name: one, mark: mark} = bridge(kernels: 1)
    %{name: other} = bridge(kernels: 1)
    [kernel] = ready(other, 1)

    for {bridge, x} <- [{one, 1}, {other, 2}] do
      {:ok, _} = SessionStore.set_variable("s", "x", x, bridge: bridge)
      :ok = Tools.register("s", "who", fn -> x end, bridge: bridge)
      :ok = Bridge.define("s", "both", "def both(ctx):\n    return [ctx['x'], ctx.call_tool('who')]", bridge: bridge)
    end

    assert Bridge.call("s", "both", [], bridge: one) == {:ok, [1, 1]}
    assert Bridge.call("s", "both", [], bridge: other) == {:ok, [2, 2]}
    assert Bridge.stop(one) == :ok
    assert marked(mark) == []
    assert {:error, %Error{name: :host_closed}} = Bridge.call("s", "both", [], bridge: one)
    assert Bridge.call("s", "both", [], bridge: other) == {:ok, [2, 2]}
    assert [%{id: id}] = Bridge.kernels!(bridge: other)
    assert id == kernel.id
  end

  # -- its end ----------------------------------------------------------------------------------

  test "a bridge that is stopped lets its commands end, with what they call, and takes no more; nothing is left" do
    %{name: bridge, mark: mark} = bridge(kernels: 2)
    furnish(bridge)
    test = self()

    nested = fn ->
      send(test, {:arrived, self()})
      receive do: (:go_on -> Bridge.call!("s", "math.hypot", [3, 4], bridge: bridge))
    end

    :ok = Tools.register("s", "nested", nested, bridge: bridge)
    :ok = Bridge.define("s", "outer", "def outer(ctx):\n    return ctx.call_tool('nested')", bridge: bridge)
    commands = for name <- ["held", "outer"], do: Task.async(fn -> Bridge.call("s", name, [], bridge: bridge) end)
    tools = for _ <- commands, do: assert_receive({:arrived, _tool}, 60_000) |> elem(1)
    directory = runtime_dir(bridge)
    assert File.exists?(directory)
    tables = for role <- [:tools, :store], do: Config.process(bridge, role)

    stopping = Task.async(fn -> Bridge.stop(bridge) end)
    eventually("it is closed", fn -> Bridge.status!(bridge: bridge).closed end)
    assert {:error, %Error{name: :host_closed}} = Bridge.call("s", "math.hypot", [3, 4], bridge: bridge)
    assert Task.yield(stopping, 0) == nil

    Enum.each(tools, &send(&1, :go_on))
    assert Task.await_many(commands, 60_000) == [{:ok, "done"}, {:ok, 5.0}]
    assert Task.await(stopping, 60_000) == :ok
    assert marked(mark) == []
    refute File.exists?(directory)
    assert Process.whereis(bridge) == nil
    for table <- tables, do: assert(:ets.whereis(table) == :undefined)
    assert {:error, %Error{name: :host_closed}} = Bridge.call("s", "math.hypot", [3, 4], bridge: bridge)
    assert Bridge.stop(bridge) == :ok
  end

  test "one that has waited long enough tells who waits still" do
    %{name: bridge, mark: mark} = bridge(kernels: 1)
    furnish(bridge)
    command = Task.async(fn -> Bridge.call("s", "held", [], bridge: bridge) end)
    assert_receive {:arrived, tool}, 60_000
    monitor = Process.monitor(tool)
    assert Bridge.stop(bridge, 1) == :ok
    assert {:error, %Error{name: :host_closed}} = Task.await(command, 60_000)
    assert_receive {:DOWN, ^monitor, :process, _, _}, 60_000
    assert marked(mark) == []
  end

  for {kind, supervisor} <- [
        {"a supervisor", quote(do: &Supervisor.start_link([&1], strategy: :one_for_one))},
        {"a dynamic supervisor", quote(do: &above/1)}
      ] do
    test "a bridge under #{kind} is started anew when it fails for good, and not when it is stopped" do
      %{name: bridge, opts: opts} = bridge(kernels: 0, start: false)
      above = start_supervised!(%{id: :above, start: {Kernel, :apply, [unquote(supervisor), [{Bridge, opts}]]}})
      first = Process.whereis(bridge)
      monitor = Process.monitor(first)
      # More often than it is borne with.
      fail_until_down(monitor, Config.process(bridge, :store))

      eventually("it is up again", fn ->
        (pid = Process.whereis(bridge)) && pid != first && match?({:ok, _}, status(bridge))
      end)

      assert Bridge.stop(bridge) == :ok
      # The supervisor is asked after it has heard of that, and done what it does about it.
      assert for({_, pid, _, _} when is_pid(pid) <- Supervisor.which_children(above), do: pid) == []
      assert Process.whereis(bridge) == nil
    end
  end

  def above(child) do
    with {:ok, pid} <- DynamicSupervisor.start_link(strategy: :one_for_one),
         {:ok, _child} <- DynamicSupervisor.start_child(pid, child),
         do: {:ok, pid}
  end

  defp fail_until_down(monitor, name) do
    if pid = Process.whereis(name), do: Process.exit(pid, :kill)

    receive do
      {:DOWN, ^monitor, :process, _, _} -> :ok
    after
      1 -> fail_until_down(monitor, name)
    end
  end

  defp status(bridge), do: with({:ok, cfg} <- Config.fetch(bridge), do: Bridge.Pool.status(cfg))

  @beam """
  {opts, []} = Code.eval_string(System.fetch_env!("OPTIONS"))
  {:ok, _} = Bridge.start_link(opts)
  report = fn report ->
    case Bridge.kernels!(bridge: opts[:name]) do
      [one, other] -> IO.puts("kernels \#{one.os_pid} \#{other.os_pid}")
      _starting -> report.(report)
    end
  end
  report.(report)
  Bridge.call("s", "time.sleep", [600], bridge: opts[:name])
  """

  test "a BEAM that is killed leaves no kernel: those that run end, one that is stopped is ended by the next host" do
    %{mark: mark, opts: opts} = bridge(kernels: 2, start: false)
    # Of its own: whatever host starts on this machine meanwhile would end what is left in the one they share.
    directory = Path.join(System.tmp_dir!(), "b#{System.unique_integer([:positive])}-#{System.pid()}")
    File.mkdir!(directory)
    on_exit(fn -> File.rm_rf!(directory) end)

    port =
      Port.open({:spawn_executable, System.find_executable("elixir")}, [
        :binary,
        :stderr_to_stdout,
        line: 1_000,
        args: ["-pa", Bridge |> :code.which() |> Path.dirname(), "-e", @beam],
        env: [
          {~c"OPTIONS", opts |> inspect(limit: :infinity) |> to_charlist()},
          {~c"TMPDIR", to_charlist(directory)}
        ]
      ])

    beam = said_pids(port, mark)
    [running, stopped] = marked(mark) |> Enum.sort()
    signal(stopped, "STOP")
    signal(beam, "KILL")
    eventually("who runs has ended", fn -> not alive?(running) end)
    # It can do nothing, and nobody can for it.
    assert alive?(stopped)
    # What a pool does when it starts.
    assert [%{killed: [^stopped]}] = Bridge.Pool.Orphans.sweep(directory)
    eventually("who was stopped has ended", fn -> marked(mark) == [] end)
  end

  # The BEAM's pid: the parent of its kernels.
  defp said_pids(port, mark) do
    assert_receive {^port, {:data, {:eol, "kernels " <> pids}}}, 60_000
    pids = pids |> String.split() |> Enum.map(&String.to_integer/1)
    assert Enum.sort(pids) == Enum.sort(marked(mark))
    {:os_pid, pid} = Port.info(port, :os_pid)
    pid
  end

  # -- callers and tools ----------------------------------------------------------------------------

  test "a caller that dies has its command cancelled, in the kernel too" do
    %{name: bridge} = bridge(kernels: 1)
    furnish(bridge)
    path = Path.join(scratch(), "cancelled")

    source = """
    async def waits(ctx, path):
        import asyncio
        try:
            await ctx.call_tool("arrived")
            await asyncio.sleep(600)
        except BaseException:  # the callback is stopped, or the task: whichever is first
            open(path, "w").close()
            raise
    """

    :ok = Bridge.define("s", "waits", source, bridge: bridge)
    caller = spawn(fn -> Bridge.call("s", "waits", [path], bridge: bridge) end)
    assert_receive {:arrived, tool}, 60_000
    monitor = Process.monitor(tool)
    Process.exit(caller, :kill)
    assert_receive {:DOWN, ^monitor, :process, _, _}, 60_000
    eventually("Python was told", fn -> File.exists?(path) end)
    eventually("its place is free", fn -> Bridge.status!(bridge: bridge).running == 0 end)
    assert DynamicSupervisor.count_children(Config.process(bridge, :commands)).active == 0
    assert {:ok, 5.0} = Bridge.call("s", "math.hypot", [3, 4], bridge: bridge)
  end

  test "a tool that raises, exits, is killed, drags a process with it or hangs is an error of its call alone" do
    %{name: bridge} = bridge(kernels: 1)
    [kernel] = ready(bridge, 1)
    furnish(bridge)
    before = children(bridge)
    bystander = Task.async(fn -> Bridge.call("s", "held", [], bridge: bridge) end)
    assert_receive {:arrived, tool}, 60_000

    tools = %{
      "raises" => fn -> raise "oh" end,
      "exits" => fn -> exit(:oh) end,
      "throws" => fn -> throw(:oh) end,
      "is_killed" => fn -> Process.exit(self(), :kill) end,
      "is_linked" => fn -> spawn_link(fn -> exit(:oh) end) && receive(do: (:never -> nil)) end,
      "hangs" => fn -> receive(do: (:never -> nil)) end
    }

    for {name, fun} <- tools do
      :ok = Tools.register("s", name, fun, bridge: bridge, timeout: if(name == "hangs", do: 50))
    end

    source = """
    def caught(ctx, name):
        try:
            ctx.call_tool(name)
        except Exception as error:
            return type(error).__name__, str(error)
    """

    :ok = Bridge.define("s", "caught", source, bridge: bridge)
    names = Map.keys(tools)
    calls = for name <- names, do: Task.async(fn -> Bridge.call("s", "caught", [name], bridge: bridge) end)

    for {name, {:ok, {type, message}}} <- Enum.zip(names, Task.await_many(calls, 60_000)) do
      assert {name, type} == {name, "ToolError"}
      if name in ["is_killed", "is_linked", "hangs"], do: assert(message =~ name)
    end

    send(tool, :go_on)
    assert Task.await(bystander, 60_000) == {:ok, "done"}
    assert children(bridge) == before
    assert [%{id: id}] = Bridge.kernels!(bridge: bridge)
    assert id == kernel.id
    assert Task.Supervisor.children(Config.process(bridge, :tool_tasks)) == []
  end

  test "a tool may wait for a command that waits for the place of the tool's own command" do
    %{name: bridge} = bridge(kernels: 1, concurrency: 1)
    test = self()
    keyed = fn -> Bridge.call("s", "math.hypot", [3, 4], bridge: bridge, idempotency_key: "k") end

    joins = fn ->
      send(test, {:arrived, self()})
      receive do: (:go_on -> elem(keyed.(), 1))
    end

    :ok = Tools.register("s", "joins", joins, bridge: bridge)
    :ok = Bridge.define("s", "outer", "def outer(ctx):\n    return ctx.call_tool('joins')", bridge: bridge)
    outer = Task.async(fn -> Bridge.call("s", "outer", [], bridge: bridge) end)
    assert_receive {:arrived, tool}, 60_000
    waiting = Task.async(keyed)
    eventually("it waits", fn -> Bridge.status!(bridge: bridge).waiting == 1 end)
    send(tool, :go_on)
    assert Task.await_many([outer, waiting], 60_000) == [{:ok, 5.0}, {:ok, 5.0}]
  end

  test "commands in tools of commands in tools need no second place" do
    %{name: bridge} = bridge(kernels: 1, concurrency: 1)

    source = """
    def down(ctx, depth):
        ctx[f"at {depth}"] = depth
        return [depth] + ctx.call_tool("deeper", depth=depth + 1)
    """

    :ok = Bridge.define("s", "down", source, bridge: bridge)

    deeper = fn
      %{"depth" => 4} -> []
      %{"depth" => depth} -> Bridge.call!("s", "down", [depth], bridge: bridge)
    end

    :ok = Tools.register("s", "deeper", deeper, bridge: bridge)
    assert Bridge.call("s", "down", [1], bridge: bridge) == {:ok, [1, 2, 3]}
    for depth <- 1..3, do: assert(SessionStore.get_variable("s", "at #{depth}", bridge: bridge) == {:ok, depth})
  end
end
