defmodule Bridge.RecoveryTest do
  # Commands that were interrupted, where the scenarios do not look: at whoever comes at the same moment, and at bridges
  # that are stopped while nothing runs yet.
  use ExUnit.Case, async: true

  import Bridge.TestProcesses

  alias Bridge.{Config, Error, SessionStore, Tools}

  @source """
  def f(ctx):
      paid = ctx.call_tool("pay")
      return [paid, ctx.call_tool("held")]
  """

  # A bridge with that store; `counts` outlives it.
  defp host(directory, counts, opts \\ []) do
    opts = Keyword.merge([store: Path.join(directory, "store"), python: Bridge.TestKernels.python(), kernels: 1], opts)
    name = :"Bridge.Recovery#{System.unique_integer([:positive])}"
    start_supervised!({Bridge, [name: name] ++ opts}, id: name)
    test = self()
    session = Bridge.session("s", bridge: name)

    :ok =
      Tools.register(session, "pay", fn ->
        :counters.add(counts, 1, 1)
        "paid"
      end)

    held = fn ->
      send(test, {:held, self()})
      receive do: ({:return, value} -> value)
    end

    :ok = Tools.register(session, "held", held, idempotent: true)
    session
  end

  defp held! do
    assert_receive {:held, tool}, 60_000
    tool
  end

  # One that has paid, and was cut short.
  defp interrupted(directory, counts, opts \\ [], again \\ []) do
    session = host(directory, counts)
    :ok = Bridge.define(session, "f", @source)
    command = Task.async(fn -> Bridge.call(session, "f", [], opts) end)
    held!()
    :ok = Bridge.stop(session.bridge, 1)
    assert {:error, %Error{name: :host_closed}} = Task.await(command, 60_000)
    host(directory, counts, again)
  end

  setup do
    directory = Path.join(System.tmp_dir!(), "recovery-#{System.pid()}-#{System.unique_integer([:positive])}")
    File.mkdir_p!(directory)
    on_exit(fn -> File.rm_rf!(directory) end)
    {:ok, tmp_dir: directory, counts: :counters.new(1, [])}
  end

  for {store, kind} <- [{true, "on disk"}, {false, "in memory"}] do
    test "a tool that runs when its command has lost its kernels is not cut short: who comes with the key has its reply, #{kind}",
         %{tmp_dir: dir, counts: counts} do
      session = host(dir, counts, if(unquote(store), do: [], else: [store: nil]))
      test = self()

      ship = fn ->
        :counters.add(counts, 1, 1)
        send(test, {:held, self()})
        receive do: ({:return, value} -> value)
      end

      :ok = Tools.register(session, "ship", ship)
      :ok = Bridge.define(session, "f", "def f(ctx):\n    return ctx.call_tool('ship')")
      command = Task.async(fn -> Bridge.call(session, "f", [], idempotency_key: "k", retries: 0) end)
      tool = held!()
      [%{os_pid: os_pid}] = ready(session.bridge, 1)
      signal(os_pid, "KILL")
      assert {:error, %Error{name: :kernel_died}} = Task.await(command, 60_000)
      assert {:ok, [%{subject: "f"}]} = Bridge.interrupted(bridge: session.bridge)

      again = for _ <- 1..3, do: Task.async(fn -> Bridge.call(session, "f", [], idempotency_key: "k") end)
      send(tool, {:return, "shipped"})
      assert Task.await_many(again, 60_000) == List.duplicate({:ok, "shipped"}, 3)
      assert :counters.get(counts, 1) == 1
      refute_received {:held, _}
      assert {:ok, []} = Bridge.interrupted(bridge: session.bridge)
    end
  end

  test "one that is to go on, and gets no kernel, is there still", %{tmp_dir: dir, counts: counts} do
    %{bridge: bridge} = interrupted(dir, counts, [], kernels: 0)
    {:ok, [%{id: id, attempts: 1} = before]} = Bridge.interrupted(bridge: bridge)
    assert {:error, %Error{name: :deadline_exceeded}} = Bridge.resume(id, deadline: 20, bridge: bridge)
    assert {:ok, [^before]} = Bridge.interrupted(bridge: bridge)

    given_up = Task.async(fn -> Bridge.resume(id, bridge: bridge) end)
    eventually("it waits", fn -> Bridge.status!(bridge: bridge).waiting == 1 end)
    Task.shutdown(given_up, :brutal_kill)
    eventually("it waits no more", fn -> Bridge.interrupted(bridge: bridge) == {:ok, [before]} end)

    :ok = Bridge.scale(1, bridge: bridge)
    resumed = Task.async(fn -> Bridge.resume(id, bridge: bridge) end)
    send(held!(), {:return, "done"})
    assert {:ok, ["paid", "done"]} = Task.await(resumed, 60_000)
    assert :counters.get(counts, 1) == 1
  end

  test "of a command that has secrets no argument of a call in doubt is shown", %{tmp_dir: dir, counts: counts} do
    session = host(dir, counts)
    test = self()
    :ok = Bridge.Secrets.put(session, "TOKEN", "sk-planted")

    send_to = fn _token ->
      send(test, {:held, self()})
      receive do: (:never -> nil)
    end

    :ok = Tools.register(session, "send", send_to, args: ["token"])
    source = "def f(ctx):\n    return ctx.call_tool('send', token=ctx.secret('TOKEN'))"
    :ok = Bridge.define(session, "f", source, secrets: ["TOKEN"])
    command = Task.async(fn -> Bridge.call(session, "f") end)
    held!()
    :ok = Bridge.stop(session.bridge, 1)
    assert {:error, %Error{name: :host_closed}} = Task.await(command, 60_000)

    %{bridge: bridge} = host(dir, counts, kernels: 0)

    assert {:ok, [%{id: id, in_doubt: [%{tool: "send", call: "tool send(…)"}]} = shown]} =
             Bridge.interrupted(bridge: bridge)

    assert {:error, %Error{name: :effect_in_doubt, message: message}} = Bridge.resume(id, bridge: bridge)
    assert message =~ "tool send(…)"
    for text <- [message, inspect(shown, structs: false)], do: refute(text =~ "planted")
  end

  test "of several that resume a command at once one does, and it pays no second time", %{tmp_dir: dir, counts: counts} do
    session = interrupted(dir, counts)
    {:ok, [%{id: id, attempts: 1}]} = Bridge.interrupted(bridge: session.bridge)
    resumers = for _ <- 1..8, do: Task.async(fn -> Bridge.resume(id, bridge: session.bridge) end)
    send(held!(), {:return, "done"})
    results = Task.await_many(resumers, 60_000)
    assert [{:ok, ["paid", "done"]}] = Enum.filter(results, &match?({:ok, _}, &1))
    assert 7 = Enum.count(results, &match?({:error, %Error{name: :not_found}}, &1))
    assert :counters.get(counts, 1) == 1
    refute_received {:held, _}
    assert {:ok, []} = Bridge.interrupted(bridge: session.bridge)
  end

  test "who resumes it and who comes with its key share one run", %{tmp_dir: dir, counts: counts} do
    session = interrupted(dir, counts, idempotency_key: "k")
    {:ok, [%{id: id, key: "k"}]} = Bridge.interrupted(bridge: session.bridge)
    callers = for _ <- 1..4, do: Task.async(fn -> Bridge.call(session, "f", [], idempotency_key: "k") end)
    resumers = for _ <- 1..4, do: Task.async(fn -> Bridge.resume(id, bridge: session.bridge) end)
    send(held!(), {:return, "done"})
    assert Enum.uniq(Task.await_many(callers, 60_000)) == [{:ok, ["paid", "done"]}]
    for {:error, error} <- Task.await_many(resumers, 60_000), do: assert(error.name == :not_found)
    assert :counters.get(counts, 1) == 1
    refute_received {:held, _}
  end

  test "the result of a command that was resumed is its key's, though its function is another by now", %{
    tmp_dir: dir,
    counts: counts
  } do
    session = interrupted(dir, counts, idempotency_key: "k")
    :ok = Bridge.define(session, "f", @source <> "\n# another")
    {:ok, [%{id: id}]} = Bridge.interrupted(bridge: session.bridge)
    resumed = Task.async(fn -> Bridge.resume(id, bridge: session.bridge) end)
    send(held!(), {:return, "done"})
    assert {:ok, ["paid", "done"]} = Task.await(resumed, 60_000)
    :ok = Bridge.define(session, "f", @source)
    assert {:ok, ["paid", "done"]} = Bridge.call(session, "f", [], idempotency_key: "k")
  end

  test "a command whose process was killed goes on by its key, and pays no second time", %{tmp_dir: dir, counts: counts} do
    session = host(dir, counts)
    :ok = Bridge.define(session, "f", @source)
    command = Task.async(fn -> Bridge.call(session, "f", [], idempotency_key: "k") end)
    held!()
    [{_, pid, _, _}] = DynamicSupervisor.which_children(Config.process(session.bridge, :commands))
    Process.exit(pid, :kill)
    assert {:error, %Error{name: :internal_error}} = Task.await(command, 60_000)
    again = Task.async(fn -> Bridge.call(session, "f", [], idempotency_key: "k") end)
    send(held!(), {:return, "done"})
    assert {:ok, ["paid", "done"]} = Task.await(again, 60_000)
    assert :counters.get(counts, 1) == 1
  end

  test "a command that waits for a kernel when its bridge is stopped is told at once, and goes on in the next", %{
    tmp_dir: dir,
    counts: counts
  } do
    session = host(dir, counts, kernels: 0)
    :ok = Bridge.define(session, "f", @source)
    command = Task.async(fn -> Bridge.call(session, "f") end)
    eventually("it waits", fn -> Bridge.status!(bridge: session.bridge).waiting == 1 end)
    # Nothing runs: there is nothing to wait for.
    :ok = Bridge.stop(session.bridge, :infinity)
    assert {:error, %Error{name: :host_closed}} = Task.await(command, 60_000)

    session = host(dir, counts)
    assert {:ok, [%{id: id, subject: "f", in_doubt: []}]} = Bridge.interrupted(bridge: session.bridge)
    resumed = Task.async(fn -> Bridge.resume(id, bridge: session.bridge) end)
    send(held!(), {:return, "done"})
    assert {:ok, ["paid", "done"]} = Task.await(resumed, 60_000)
  end

  test "a command that comes when its bridge is being stopped has not begun, and does not go on in the next", %{
    tmp_dir: dir,
    counts: counts
  } do
    session = host(dir, counts)
    :ok = Bridge.define(session, "f", @source)
    command = Task.async(fn -> Bridge.call(session, "f") end)
    tool = held!()
    stopping = Task.async(fn -> Bridge.stop(session.bridge) end)
    eventually("it is closed", fn -> Bridge.status!(bridge: session.bridge).closed end)
    assert {:error, %Error{name: :host_closed}} = Bridge.call(session, "f")
    assert {:error, %Error{name: :host_closed}} = Bridge.call(session, "f", [], idempotency_key: "k")
    assert_raise Error, ~r/being stopped/, fn -> session |> Bridge.stream("f") |> Enum.to_list() end
    send(tool, {:return, "done"})
    assert {:ok, ["paid", "done"]} = Task.await(command, 60_000)
    assert :ok = Task.await(stopping, 60_000)

    session = host(dir, counts)
    assert {:ok, []} = Bridge.interrupted(bridge: session.bridge)
    assert :counters.get(counts, 1) == 1
  end

  test "a command that lost its kernels, was resumed, and lost them again has still paid once", %{
    tmp_dir: dir,
    counts: counts
  } do
    session = host(dir, counts)

    source = """
    def f(ctx):
        return [ctx.call_tool("pay")] + [ctx.call_tool("held") for _ in range(4)]
    """

    :ok = Bridge.define(session, "f", source)

    for number <- 1..3 do
      command = Task.async(fn -> Bridge.call(session, "f", [], idempotency_key: "k", retries: 0) end)
      tool = held!()
      [%{os_pid: os_pid}] = ready(session.bridge, 1)
      signal(os_pid, "KILL")
      assert {:error, %Error{name: :kernel_died}} = Task.await(command, 60_000)
      send(tool, {:return, number})
    end

    command = Task.async(fn -> Bridge.call(session, "f", [], idempotency_key: "k") end)
    send(held!(), {:return, 4})
    assert {:ok, ["paid", 1, 2, 3, 4]} = Task.await(command, 60_000)
    assert :counters.get(counts, 1) == 1
  end

  test "who is told that a command failed, or that it succeeded, never finds it among the interrupted", %{
    tmp_dir: dir,
    counts: counts
  } do
    session = host(dir, counts)

    :ok =
      Bridge.define(session, "ends", "def ends(ctx, well):\n    ctx.call_tool('pay')\n    return 1 if well else 1 // 0")

    assert {:ok, 1} = Bridge.call(session, "ends", [true])
    # What was on disk when its caller was told, and not what came there later.
    copied = fn name -> File.cp_r!(Path.join(dir, "store"), Path.join(dir, name)) end
    copied.("succeeded")
    assert {:error, %Error{name: :remote_error}} = Bridge.call(session, "ends", [false])
    copied.("failed")

    for name <- ["succeeded", "failed"] do
      File.rename!(Path.join(dir, name), Path.join([dir, "#{name}-", "store"]) |> tap(&File.mkdir_p!(Path.dirname(&1))))
      File.rm(Path.join([dir, "#{name}-", "store", "lock"]))
      other = host(Path.join(dir, "#{name}-"), counts, kernels: 0)
      assert {:ok, []} = Bridge.interrupted(bridge: other.bridge)
    end
  end

  test "a store that cannot be written any more fails the commands that need it, and their callers are told", %{
    tmp_dir: dir,
    counts: counts
  } do
    session = host(dir, counts)
    :ok = Bridge.define(session, "f", @source)
    :ok = Bridge.define(session, "w", "def w(ctx):\n    ctx['x'] = ctx.call_tool('held')")
    writing = Task.async(fn -> Bridge.call(session, "w") end)
    tool = held!()
    {:ok, cfg} = Config.fetch(session.bridge)
    disk = :sys.get_state(Config.process(cfg.name, :store)).disk
    assert is_struct(disk) or is_map(disk)
    Process.exit(Bridge.Store.Disk.process(disk), :kill)
    send(tool, {:return, 1})
    assert {:error, %Error{name: name}} = Task.await(writing, 60_000)
    assert name in [:store_failed, :host_closed]
    eventually("it is up again", fn -> match?({:ok, _}, SessionStore.sessions(bridge: session.bridge)) end)
    assert {:error, %Error{name: :not_found}} = SessionStore.get_variable(session, "x")
  end
end
