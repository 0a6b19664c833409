defmodule Bridge.CommandTest do
  # What a command is for who sends it, where the scenarios do not look. Real kernels, those of the module unless said otherwise.
  use ExUnit.Case, async: true

  import Bridge.TestProcesses

  alias Bridge.{Callbacks, Command, Config, Error, Journal, SessionStore, Tools}

  setup_all do
    name = __MODULE__.Host
    start_supervised!({Bridge, name: name, kernels: 2, python: Bridge.TestKernels.python()})
    {:ok, bridge: name}
  end

  setup %{bridge: bridge} do
    {:ok, session: Bridge.session(nil, bridge: bridge)}
  end

  # A tool that tells this process and waits until it is told what to return; `calls` are all there were.
  defp held(session, name, opts \\ []) do
    test = self()

    fun = fn ->
      send(test, {:held, name, self()})
      receive do: ({:return, value} -> value)
    end

    :ok = Tools.register(session, name, fun, opts)
  end

  defp held!(name) do
    assert_receive {:held, ^name, tool}, 60_000
    tool
  end

  defp counted(session, name) do
    count = :counters.new(1, [])

    :ok =
      Tools.register(session, name, fn ->
        :counters.add(count, 1, 1)
        :counters.get(count, 1)
      end)

    fn -> :counters.get(count, 1) end
  end

  defp processes(bridge), do: DynamicSupervisor.which_children(Config.process(bridge, :commands))

  # The process of the one command that runs in the session.
  defp process_of(bridge, session) do
    Enum.find_value(processes(bridge), fn {_, pid, _, _} -> if :sys.get_state(pid).session == session.id, do: pid end)
  end

  # -- what is refused before it begins ---------------------------------------------------------

  test "what cannot be sent is an error, and not raised", %{session: session} do
    for {function, args, opts} <- [
          {<<255>>, [], []},
          {"f", %{<<255>> => 1}, []},
          {"f", [], [deadline: 1.0e300]},
          {"f", [], [deadline: 0]},
          {"f", [], [deadline: :infinity]},
          {"f", [], [retries: -1]},
          {"f", [], [idempotency_key: ""]},
          {"f", [], [idempotency_key: <<255>>]}
        ] do
      assert {:error, %Error{name: name}} = Bridge.call(session, function, args, opts)
      assert name in [:invalid_params, :not_serializable]
    end
  end

  # -- somebody's own functions --------------------------------------------------------------------

  test "what on_output raises breaks no command" do
    %{name: bridge} = bridge(on_output: fn output -> raise "no #{output.text}" end)

    assert {:ok, nil} = Bridge.call("s", "builtins.print", ["secret"], bridge: bridge)
    assert {:ok, 5.0} = Bridge.call("s", "math.hypot", [3, 4], bridge: bridge)
  end

  test "a handler that is told of a command's beginning may send one itself", %{session: session, bridge: bridge} do
    test = self()

    handler = fn _event, _numbers, said, _config ->
      if said.session == session.id and said.subject == "math.hypot",
        do: send(test, {:inner, Bridge.call(session, "math.sqrt", [16])})
    end

    :ok = Bridge.Telemetry.attach({__MODULE__, bridge}, [:bridge, :command, :start], handler)
    on_exit(fn -> Bridge.Telemetry.detach({__MODULE__, bridge}) end)
    assert {:ok, 5.0} = Bridge.call(session, "math.hypot", [3, 4])
    assert_receive {:inner, {:ok, 4.0}}
  end

  # -- reading ------------------------------------------------------------------------------------

  test "several variables are read at once, as they are", %{session: session} do
    {:ok, _} = SessionStore.update_variables(session, %{"a" => 1, "b" => {2, "x"}})
    :ok = Bridge.define(session, "f", "def f(ctx):\n    return ctx.get_variables('a', 'b', 'c')")
    assert {:ok, %{"a" => 1, "b" => {2, "x"}}} == Bridge.call(session, "f")
  end

  # -- tools --------------------------------------------------------------------------------------

  test "of very many tools that a command calls at once a bounded number runs, and all have their turn", %{
    session: session,
    bridge: bridge
  } do
    held(session, "held", idempotent: true)

    source =
      "async def f(ctx):\n    import asyncio\n    return sum(await asyncio.gather(*[ctx.call_tool('held') for _ in range(1200)]))"

    :ok = Bridge.define(session, "f", source)
    command = Task.async(fn -> Bridge.call(session, "f") end)
    first = for _ <- 1..1_000, do: held!("held")
    pid = process_of(bridge, session)

    eventually("the others wait", fn -> :queue.len(:sys.get_state(pid).tools_due) == 200 end)
    refute_received {:held, _, _}
    Enum.each(first, &send(&1, {:return, 1}))
    for _ <- 1..200, do: send(held!("held"), {:return, 1})
    assert Task.await(command, 60_000) == {:ok, 1_200}
  end

  test "a command that reads one variable over and over keeps one of it", %{session: session, bridge: bridge} do
    {:ok, _} = SessionStore.set_variable(session, "x", Enum.to_list(1..10_000))
    held(session, "held")
    source = "def f(ctx):\n    for _ in range(100):\n        ctx['x']\n    return ctx.call_tool('held')"
    :ok = Bridge.define(session, "f", source)
    command = Task.async(fn -> Bridge.call(session, "f") end)
    tool = held!("held")
    process = process_of(bridge, session)
    true = :erlang.garbage_collect(process)
    {:memory, words} = Process.info(process, :memory)
    {:binary, binaries} = Process.info(process, :binary)
    # One reading is 50,000 bytes.
    bytes = binaries |> Enum.uniq_by(&elem(&1, 0)) |> Enum.map(&elem(&1, 1)) |> Enum.sum()
    assert words + bytes < 1_000_000
    send(tool, {:return, 1})
    assert {:ok, 1} = Task.await(command, 60_000)
  end

  # -- sources ------------------------------------------------------------------------------------

  test "a source that every kernel has forgotten is sent again, to whichever has the command" do
    %{name: bridge} = bridge(kernels: 2, routing: :random, arguments: ["--Policy.max_sources=1"])
    ready(bridge, 2)

    for name <- ["f", "g"] do
      :ok = Bridge.define("s", name, "def #{name}():\n    return '#{name}'", bridge: bridge)
    end

    for n <- 1..40 do
      name = Enum.at(["f", "g"], rem(n, 2))
      assert {:ok, name} == Bridge.call("s", name, [], bridge: bridge)
    end
  end

  # -- callbacks beyond what a journal holds ----------------------------------------------------------

  test "a tool whose call the journal had no room for is answered as any other", %{bridge: bridge} do
    {:ok, cfg} = Config.fetch(bridge)

    state = %Command{
      cfg: cfg,
      session: "s",
      prepared: nil,
      terms: nil,
      id: "c",
      trace: nil,
      journal: Journal.new([], false)
    }

    state = %{state | place: %{pid: self()}}
    reply = {:ok, "1", []}
    assert ^state = Callbacks.tool_ended(state, %{n: 100_001, callback: {"comm", 7}}, reply)
    assert_received {:"$gen_cast", {:reply, {"comm", 7}, ^reply}}
  end

  # -- callers that go ------------------------------------------------------------------------------

  test "nothing is left in the mailbox of who halts a stream, or gives up waiting", %{session: session} do
    held(session, "held")
    :ok = Bridge.define(session, "many", "def many():\n    yield from range(10_000)")
    :ok = Bridge.define(session, "f", "def f(ctx):\n    return ctx.call_tool('held')")
    test = self()

    for n <- 1..20, do: assert(Enum.to_list(0..(n - 1)) == session |> Bridge.stream("many") |> Enum.take(n))

    first = Task.async(fn -> Bridge.call(session, "f", [], idempotency_key: "k") end)
    tool = held!("held")

    second =
      Task.async(fn ->
        result = Bridge.call(session, "f", [], idempotency_key: "k", deadline: 1)
        send(test, :gave_up)
        receive do: (:look -> {result, Process.info(self(), :messages)})
      end)

    assert_receive :gave_up, 60_000
    send(tool, {:return, 3})
    assert Task.await(first, 60_000) == {:ok, 3}
    send(second.pid, :look)
    assert {{:error, %Error{name: :deadline_exceeded}}, {:messages, []}} = Task.await(second, 60_000)
    assert {:messages, []} = Process.info(self(), :messages)
  end

  test "a caller that dies cancels its command wherever it is: with its tool, and its place is free", %{
    session: session,
    bridge: bridge
  } do
    held(session, "held")
    :ok = Bridge.define(session, "f", "def f(ctx):\n    ctx['x'] = 1\n    return ctx.call_tool('held')")
    caller = spawn(fn -> Bridge.call(session, "f") end)
    monitor = "held" |> held!() |> Process.monitor()
    command = Process.monitor(process_of(bridge, session))
    Process.exit(caller, :kill)
    assert_receive {:DOWN, ^monitor, :process, _, _}, 60_000
    assert_receive {:DOWN, ^command, :process, _, :normal}, 60_000
    assert {:ok, []} = SessionStore.variables(session)
    assert [%{error: :cancelled}] = Bridge.journal!(session: session, bridge: bridge)
  end

  test "a tool that traps exits ends too when nobody waits for it any more", %{session: session} do
    test = self()

    stubborn = fn ->
      Process.flag(:trap_exit, true)
      send(test, {:held, "stubborn", self()})
      receive do: (:never -> 1)
    end

    :ok = Tools.register(session, "stubborn", stubborn)
    :ok = Bridge.define(session, "f", "def f(ctx):\n    return ctx.call_tool('stubborn')")
    caller = spawn(fn -> Bridge.call(session, "f") end)
    monitor = "stubborn" |> held!() |> Process.monitor()
    Process.exit(caller, :kill)
    assert_receive {:DOWN, ^monitor, :process, _, :killed}, 60_000
  end

  # -- sessions that go ---------------------------------------------------------------------------------

  for idempotent <- [true, false] do
    test "a command whose session is deleted meanwhile fails though it wrote nothing, its tool idempotent: #{idempotent}",
         %{
           session: session
         } do
      held(session, "held", idempotent: unquote(idempotent))
      :ok = Bridge.define(session, "f", "def f(ctx):\n    return ctx.call_tool('held')")
      command = Task.async(fn -> Bridge.call(session, "f") end)
      tool = held!("held")
      :ok = SessionStore.delete_session(session)
      send(tool, {:return, 1})
      assert {:error, %Error{name: :not_found}} = Task.await(command, 60_000)
    end
  end

  test "a tool that is registered when a session of that name has just gone is the next one's", %{bridge: bridge} do
    [watch] = for {Bridge.SessionWatch, pid, _, _} <- Supervisor.which_children(bridge), do: pid
    {:ok, _} = SessionStore.create_session("again", bridge: bridge)
    :ok = Tools.register("again", "old", fn -> 1 end, bridge: bridge)
    :ok = :sys.suspend(watch)
    :ok = SessionStore.delete_session("again", bridge: bridge)
    :ok = Tools.register("again", "new", fn -> 1 end, bridge: bridge)
    :ok = :sys.resume(watch)
    :sys.get_state(watch)
    assert ["new"] = for(tool <- Tools.list!("again", bridge: bridge), do: tool.name)
  end

  # -- keys ----------------------------------------------------------------------------------------------

  test "however many come with a key, and when, it runs once", %{session: session} do
    count = counted(session, "pay")
    :ok = Bridge.define(session, "f", "def f(ctx, key):\n    return [key, ctx.call_tool('pay')]")

    # Callers that come just as another's run ends.
    for key <- 1..60 do
      callers =
        for delay <- 0..7 do
          Task.async(fn ->
            spin(delay * 400)
            Bridge.call(session, "f", [key], idempotency_key: "key #{key}")
          end)
        end

      assert [{:ok, [^key, _]}] = callers |> Task.await_many(60_000) |> Enum.uniq()
      assert count.() == key
    end
  end

  defp spin(0), do: :ok
  defp spin(n), do: spin(n - 1 + 0 * :erlang.phash2(n))

  test "who comes just as the command ends has its result", %{session: session, bridge: bridge} do
    held(session, "held")
    :ok = Bridge.define(session, "f", "def f(ctx):\n    return ctx.call_tool('held')")
    first = Task.async(fn -> Bridge.call(session, "f", [], idempotency_key: "k") end)
    held!("held")
    pid = process_of(bridge, session)
    %{ref: ref} = :sys.get_state(pid)
    :erlang.suspend_process(pid)
    # What its kernel says last is before the joiner in its mailbox: it ends without having heard of that.
    send(pid, {:bridge_kernel, ref, {:answer, {:ok, %{"value" => 1}, []}}})
    second = Task.async(fn -> Bridge.call(session, "f", [], idempotency_key: "k") end)

    eventually("it has asked", fn ->
      {:messages, messages} = Process.info(pid, :messages)
      Enum.any?(messages, &match?({:"$gen_cast", {:join, _, _, _}}, &1))
    end)

    :erlang.resume_process(pid)
    assert Task.await_many([first, second], 60_000) == [{:ok, 1}, {:ok, 1}]
    refute_received {:held, _, _}
  end

  test "a command whose process fails tells its caller so; with a key it goes on where it was", %{
    session: session,
    bridge: bridge
  } do
    count = counted(session, "pay")
    held(session, "held", idempotent: true)
    source = "def f(ctx):\n    paid = ctx.call_tool('pay')\n    return [paid, ctx.call_tool('held')]"
    :ok = Bridge.define(session, "f", source)

    for key <- [nil, "k"] do
      first = Task.async(fn -> Bridge.call(session, "f", [], idempotency_key: key) end)
      held!("held")
      pid = process_of(bridge, session)
      # Whatever may be wrong in there.
      send(pid, {:bridge_kernel, :sys.get_state(pid).ref, :nobody_knows_this})
      assert {:error, %Error{name: :internal_error}} = Task.await(first, 60_000)
    end

    paid = count.()
    again = Task.async(fn -> Bridge.call(session, "f", [], idempotency_key: "k") end)
    send(held!("held"), {:return, "done"})
    assert {:ok, [^paid, "done"]} = Task.await(again, 60_000)
    assert count.() == paid
    eventually("no place is lost", fn -> Bridge.status!(bridge: bridge).running == 0 end)
  end

  test "a command with a key that is quarantined keeps what it has paid", %{session: session} do
    %{name: bridge} = bridge(kernels: 2)
    session = %{session | bridge: bridge}
    count = counted(session, "pay")

    source = """
    def f(ctx):
        import os
        paid = ctx.call_tool("pay")
        if os.path.exists(ctx["flag"]):
            os._exit(1)
        return paid
    """

    flag = Path.join(System.tmp_dir!(), "flag-#{session.id}")
    File.write!(flag, "")
    on_exit(fn -> File.rm(flag) end)
    {:ok, _} = SessionStore.set_variable(session, "flag", flag)
    :ok = Bridge.define(session, "f", source)
    assert {:error, %Error{name: :quarantined}} = Bridge.call(session, "f", [], idempotency_key: "k")
    assert {:error, %Error{name: :quarantined}} = Bridge.call(session, "f", [], idempotency_key: "k")
    assert count.() == 1

    :ok = Bridge.release("f", bridge: bridge)
    File.rm!(flag)
    assert {:ok, 1} = Bridge.call(session, "f", [], idempotency_key: "k")
    assert {:ok, 1} = Bridge.call(session, "f", [], idempotency_key: "k")
    assert count.() == 1
  end
end
