defmodule Bridge.SoakTest do
  # Many commands, and flat memory: here, and in the kernel. `BRIDGE_SOAK` says how many; 100000 take five minutes.
  use ExUnit.Case, async: false

  import Bridge.TestProcesses

  alias Bridge.{Config, SessionStore, Tools}

  @commands String.to_integer(System.get_env("BRIDGE_SOAK", "5000"))
  @workers 8
  # What is kept of the past, to a bound that a short run does not reach: rows of tables (the commands that have ended,
  # the events), and bytes of a kernel's process, for the signatures that it has seen.
  @bounds %{:bridge_store_ended => 10_000, Bridge.Telemetry => 10_000}
  @seen_bytes 25_000_000
  # What a process or a table may differ by from one moment to another.
  @noise_bytes 400_000
  @noise_rss 12_000_000

  @moduletag timeout: 60_000 + @commands * 60

  @source """
  def everything(ctx, i, payload):
      ctx["last"] = payload
      ctx[f"of {i % 5}"] = ctx.get_variable("seed") + i
      ctx.delete_variable("last") if i % 7 == 0 else None
      if i % 5 == 0:
          print("line", i)
      if i % 11 == 0:
          raise ValueError(f"number {i}")
      return ctx.call_tool("twice", x=i)
  """
  @stream "def stream(ctx, n):\n    yield from range(n)\n"
  # As wrong as code can be: each keeps something for ever. See the second test.
  @keeps """
  def keeps(ctx, i):
      import sabotage
      sabotage.keep(100_000)
      return ctx.call_tool("keeps", i=i)
  """

  setup do
    python = Path.expand("../../../tests/kernelside", __DIR__)
    %{name: bridge} = bridge(kernels: 1, env: %{"PYTHONPATH" => python}, on_output: fn _output -> :ok end)
    opts = [bridge: bridge]
    {:ok, _} = SessionStore.set_variable("s", "seed", 1, opts)

    for {name, source} <- [{"everything", @source}, {"stream", @stream}, {"keeps", @keeps}],
        do: :ok = Bridge.define("s", name, source, opts)

    :ok = Tools.register("s", "twice", fn %{"x" => x} -> 2 * x end, opts)
    {:ok, counter} = Bridge.create_instance("collections.Counter", [], [session: "s", name: "counter"] ++ opts)
    ready(bridge, 1)
    {:ok, bridge: bridge, counter: counter}
  end

  test "memory is flat, here and in the kernel, however many commands run", %{bridge: bridge, counter: counter} do
    # What is kept to a bound is filled first, as far as there is time for it.
    warm_up = div(@commands, 3)
    work(bridge, counter, 0, warm_up)
    # Twice: to look loads code, which has atoms.
    held(bridge)
    before = held(bridge)
    {us, :ok} = :timer.tc(fn -> work(bridge, counter, warm_up, @commands) end)
    later = held(bridge)
    ran = @commands - warm_up
    IO.puts("soak: #{ran} commands, #{round(ran * 1.0e6 / us)} a second; #{summary(before)} -> #{summary(later)}")
    assert grown(before, later, ran) == []
  end

  test "what is kept for ever is noticed, of every kind", %{bridge: bridge, counter: counter} do
    test = self()
    hoard = spawn_link(fn -> hoard([]) end)
    Process.register(hoard, :"#{bridge}.Hoard")
    table = :ets.new(:hoard, [:public])

    keeps = fn %{"i" => i} ->
      String.to_atom("kept #{i} of #{inspect(test)}")
      :ets.insert(table, {i, String.duplicate("x", 5_000)})
      send(hoard, {:keep, :binary.copy("x", 20_000)})
      send(hoard, {:keep, Enum.to_list(1..1_000)})
      send(hoard, :start_another)
      :ets.new(:kept, [:public, {:heir, hoard, nil}])
      nil
    end

    :ok = Tools.register("s", "keeps", keeps, bridge: bridge)
    work(bridge, counter, 0, 100)
    held(bridge)
    before = held(bridge, [hoard])
    for i <- 1..200, do: {:ok, nil} = Bridge.call("s", "keeps", [i], bridge: bridge)
    found = grown(before, held(bridge, [hoard]), 200)

    for what <- ~w(atoms processes tables binary rss hoard rows) do
      assert Enum.any?(found, &String.contains?(&1, what)), "#{what} was not noticed: #{inspect(found)}"
    end
  end

  defp hoard(kept) do
    receive do
      {:keep, what} ->
        hoard([what | kept])

      :start_another ->
        spawn_link(fn -> receive do: (:never -> nil) end)
        hoard(kept)

      _table_of_a_tool ->
        hoard(kept)
    end
  end

  # -- the work ------------------------------------------------------------------------------------

  defp work(bridge, counter, from, to) do
    1..@workers
    |> Enum.map(fn worker ->
      Task.async(fn ->
        for i <- from..(to - 1)//1, rem(i, @workers) == worker - 1, do: one(bridge, counter, i) && nil
      end)
    end)
    |> Task.await_many(:infinity)

    :ok
  end

  defp one(bridge, counter, i) do
    opts = [bridge: bridge]

    case rem(i, 10) do
      n when n in 0..3 ->
        payload = %{
          "i" => i,
          "text" => String.duplicate("é", 200),
          "data" => %Bridge.Bytes{data: :binary.copy(<<1>>, 2_000)}
        }

        case Bridge.call("s", "everything", [i, payload], opts) do
          {:ok, twice} -> ^twice = 2 * i
          {:error, %{type: "ValueError"}} -> :ok
        end

      n when n in 4..6 ->
        {:ok, ^i} = Bridge.call("s", "operator.index", [i], opts)

      7 ->
        {:ok, 3} = Bridge.call("s", "builtins.len", ["abc"], [idempotency_key: "key #{rem(i, 100)}"] ++ opts)

      8 ->
        [0, 1, 2] = "s" |> Bridge.stream("stream", [20], opts) |> Enum.take(3)

      9 ->
        # Others change it too: that is told, and is no matter here.
        case Bridge.call_method(counter, "update", [["a"]], opts) do
          {:ok, nil} -> :ok
          {:error, %{name: :conflict}} -> :ok
        end
    end
  end

  # -- what is held ----------------------------------------------------------------------------------

  defp held(bridge, more \\ []) do
    idle(bridge)
    processes = Enum.filter(Process.list(), &ours?(&1, bridge)) ++ more
    for pid <- Process.list(), do: :erlang.garbage_collect(pid)

    %{
      processes: length(Process.list()),
      ports: length(Port.list()),
      atoms: :erlang.system_info(:atom_count),
      tables: length(:ets.all()),
      binary: :erlang.memory(:binary),
      total: :erlang.memory(:total),
      rss: bridge |> kernels() |> Enum.map(&rss(&1.os_pid)) |> Enum.sum(),
      memory:
        for(pid <- processes, {:memory, bytes} <- [Process.info(pid, :memory)], into: %{}, do: {name(pid), bytes}),
      rows: for(table <- :ets.all(), is_integer(rows = :ets.info(table, :size)), into: %{}, do: {table, rows})
    }
  end

  defp kernels(bridge), do: Bridge.kernels!(bridge: bridge)

  # Those that are there as long as the bridge is.
  defp ours?(pid, bridge) do
    case Process.info(pid, :dictionary) do
      {:dictionary, dictionary} -> bridge in Keyword.get(dictionary, :"$ancestors", [])
      nil -> false
    end
  end

  defp name(pid) do
    case Process.info(pid, [:registered_name, :dictionary]) do
      [registered_name: name, dictionary: _] when is_atom(name) and name != [] ->
        inspect(name) |> String.downcase()

      [registered_name: _, dictionary: dictionary] ->
        "#{inspect(Keyword.get(dictionary, :"$initial_call"))} #{inspect(pid)}"
    end
  end

  defp idle(bridge) do
    eventually("nothing runs any more", fn ->
      busy =
        for role <- [:commands, :tool_tasks], do: DynamicSupervisor.count_children(Config.process(bridge, role)).active

      busy == [0, 0] and Bridge.status!(bridge: bridge).running == 0
    end)
  end

  defp grown(before, later, commands) do
    counted =
      for what <- [:processes, :ports, :tables],
          later[what] > before[what],
          do: "#{what}: #{before[what]} -> #{later[what]}"

    # What is loaded for the first time has atoms: not one a command.
    atoms =
      if later.atoms - before.atoms > div(commands, 10), do: ["atoms: #{before.atoms} -> #{later.atoms}"], else: []

    bytes =
      for {what, noise} <- [binary: 5 * @noise_bytes, rss: @noise_rss], later[what] - before[what] > noise do
        "#{what}: #{before[what]} -> #{later[what]}"
      end

    memory =
      for {name, bytes} <- later.memory,
          noise = if(name =~ "Bridge.Kernel,", do: @seen_bytes, else: @noise_bytes),
          bytes - Map.get(before.memory, name, 0) > noise,
          do: "memory of #{name}: #{before.memory[name]} -> #{bytes}"

    rows =
      for {table, rows} <- later.rows, old = Map.get(before.rows, table, 0), rows > old + 20, rows > bound(table) do
        "rows of #{inspect(table)}: #{old} -> #{rows}"
      end

    counted ++ atoms ++ bytes ++ memory ++ rows
  end

  defp bound(table), do: Map.get(@bounds, :ets.info(table, :name), 0)

  defp summary(held) do
    bytes = for what <- [:total, :binary, :rss], do: "#{what} #{Float.round(held[what] / 1_048_576, 1)} MiB"
    counts = for what <- [:processes, :ports, :tables, :atoms], do: "#{what} #{held[what]}"
    Enum.join(bytes ++ counts, ", ")
  end
end
