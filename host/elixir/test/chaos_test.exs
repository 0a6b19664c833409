defmodule Bridge.ChaosTest do
  # Kernels killed, stopped and cut off, and their processes here killed, while many sessions work. Nothing may be lost
  # or doubled. `BRIDGE_CHAOS_SECONDS` makes it longer, `BRIDGE_CHAOS_SEED` chooses the same faults again,
  # `BRIDGE_CHAOS_SESSIONS` is how many sessions there are.
  use ExUnit.Case, async: false

  import Bridge.TestProcesses

  alias Bridge.{Config, Error, SessionStore, Tools}

  @seconds String.to_integer(System.get_env("BRIDGE_CHAOS_SECONDS", "15"))
  @sessions String.to_integer(System.get_env("BRIDGE_CHAOS_SESSIONS", "40"))
  @kernels 3
  # Each session does at least so many, however short the time is.
  @steps 3
  @finish_ms 240_000
  @chunks 24
  @tests Path.expand("../../../tests", __DIR__)

  @kinds ~w(note look order gather deposit stream nested abandoned)a
  # The effects of tools that each kind has.
  @parts %{
    note: [],
    look: [],
    order: ~w(pay ship),
    gather: ~w(part-0 part-1 part-2),
    deposit: ~w(pay),
    stream: ~w(pay),
    nested: ~w(inner),
    abandoned: ~w(pay)
  }
  @writes ~w(order gather deposit stream nested)a
  # What may become of a command when kernels die all the time.
  @expected ~w(kernel_died quarantined circuit_open kernel_start_failed)a

  @abandoned """
  def abandoned(ctx, biz):
      import time
      ctx.call_tool("pay", biz=biz, part="pay")
      ctx["abandoned"] = biz
      time.sleep(0.02)
  """

  @moduletag timeout: @seconds * 1_000 + 4 * @finish_ms

  setup do
    directory = Path.join(System.tmp_dir!(), "chaos-#{System.pid()}-#{System.unique_integer([:positive])}")
    File.mkdir_p!(directory)
    on_exit(fn -> File.rm_rf!(directory) end)
    {:ok, directory: directory}
  end

  test "no write is lost and no effect doubled, whatever is killed, and nothing is left", %{directory: directory} do
    seed = String.to_integer(System.get_env("BRIDGE_CHAOS_SEED", to_string(:rand.uniform(1_000_000))))
    IO.puts("BRIDGE_CHAOS_SEED=#{seed} for #{@seconds} s")
    store = Path.join(directory, "store")

    # What is loaded or made once is there before it is counted.
    once = bridge(kernels: 1)
    {:ok, 5.0} = Bridge.call("s", "math.hypot", [3, 4], bridge: once.name)
    :ok = Bridge.stop(once.name)
    before = held()

    python = Enum.map_join(["chaos/kernelside", "kernelside"], ":", &Path.join(@tests, &1))

    %{name: bridge, mark: mark, opts: opts} =
      bridge(
        start: false,
        kernels: @kernels,
        store: store,
        heartbeat: 1_000,
        breaker: %{cooldown: 300},
        env: %{"PYTHONPATH" => python}
      )

    {:ok, above} = Supervisor.start_link([{Bridge, opts}], strategy: :one_for_one)
    children = Supervisor.which_children(bridge)

    run = %{
      bridge: bridge,
      seed: seed,
      told: :ets.new(:told, [:public, :duplicate_bag]),
      effects: :ets.new(:effects, [:public, :duplicate_bag]),
      at: :ets.new(:at, [:public]),
      ending: :atomics.new(1, [])
    }

    workers = for number <- 1..@sessions, do: Task.async(fn -> live(run, "s#{number}") end)
    # One that cannot go on is known at once, and ends the test.
    counts = faults(run, mark, :rand.seed_s(:exsss, seed), now() + @seconds * 1_000, %{})
    :atomics.put(run.ending, 1, 1)
    ends = Task.yield_many(workers, @finish_ms)

    where = :ets.tab2list(run.at)
    assert where == [], "seed #{seed}: these hang: #{inspect(where, limit: :infinity)}"
    for {_worker, ended} <- ends, do: assert({:ok, :ok} = ended)

    assert Supervisor.which_children(bridge) == children, "seed #{seed}: more than kernels was started anew"
    ready(bridge, @kernels)
    idle(bridge)
    told = run.told |> :ets.tab2list() |> Enum.frequencies_by(&elem(&1, 0))
    IO.puts("#{inspect(told)}, #{:ets.info(run.effects, :size)} effects, #{inspect(counts)}")
    assert Enum.any?(counts), "seed #{seed}: nothing happened"
    found = problems(run)
    assert found == [], "seed #{seed}, #{length(found)} problems or more:\n#{found |> Enum.take(20) |> Enum.join("\n")}"

    assert Bridge.stop(bridge) == :ok
    Supervisor.stop(above)
    assert marked(mark) == []

    # Another life: it has what it was told that it has.
    again = bridge(kernels: 0, store: store)
    found = problems(%{run | bridge: again.name})
    assert found == [], "seed #{seed}, opened again:\n#{found |> Enum.take(20) |> Enum.join("\n")}"
    assert {:ok, []} = Bridge.interrupted(bridge: again.name)
    :ok = Bridge.stop(again.name)

    for table <- [run.told, run.effects, run.at], do: :ets.delete(table)

    eventually(fn -> "seed #{seed}: back to #{inspect(before)}, and not at #{inspect(held())}" end, fn ->
      Enum.all?(held(), fn {what, count} -> count <= before[what] end)
    end)
  end

  defp held do
    %{
      processes: :erlang.system_info(:process_count),
      ports: :erlang.system_info(:port_count),
      tables: length(:ets.all()),
      # Logger keeps the levels of modules there, as they come.
      terms: Enum.count(:persistent_term.get(), &(not match?({{:logger_config, _}, _}, &1)))
    }
  end

  defp idle(bridge) do
    eventually(fn -> "nothing runs any more, but #{inspect(Bridge.status!(bridge: bridge))}" end, fn ->
      busy =
        for role <- [:commands, :tool_tasks], do: DynamicSupervisor.count_children(Config.process(bridge, role)).active

      %{running: running, waiting: waiting} = Bridge.status!(bridge: bridge)
      busy == [0, 0] and running == 0 and waiting == 0
    end)
  end

  # -- what goes wrong ---------------------------------------------------------------------------

  defp faults(run, mark, chance, until, counts) do
    {pause, chance} = :rand.uniform_s(900, chance)
    {which, chance} = :rand.uniform_s(1_000, chance)
    {what, chance} = :rand.uniform_s(4, chance)

    receive do
      {_worker, result} -> flunk("a session has ended: #{inspect(result)}")
      {:DOWN, _, :process, _, reason} -> flunk("a session has ended: #{inspect(reason)}")
    after
      50 + pause -> :ok
    end

    if now() < until do
      what = Enum.at([:kill, :stop, :cut, :process], what - 1)
      # Only those that are ready: one that is stopped while it starts holds its place up for as long as it may take.
      kernels = Bridge.kernels!(bridge: run.bridge)
      if kernels != [], do: happen(what, Enum.at(kernels, rem(which, length(kernels))))
      faults(run, mark, chance, until, Map.update(counts, if(kernels == [], do: :none, else: what), 1, &(&1 + 1)))
    else
      counts
    end
  end

  defp happen(:kill, kernel), do: signal(kernel.os_pid, "KILL")
  defp happen(:stop, kernel), do: signal(kernel.os_pid, "STOP")
  # tests/chaos/kernelside/sitecustomize.py.
  defp happen(:cut, kernel), do: signal(kernel.os_pid, "USR2")
  defp happen(:process, kernel), do: Process.exit(kernel.pid, :kill)

  # -- a session's life ----------------------------------------------------------------------------

  defp live(run, session) do
    furnish(run, session)
    wallet = insist(fn -> Bridge.create_instance("workload.Wallet", [], session: session, bridge: run.bridge) end)
    work(run, session, wallet, 0)
  end

  defp furnish(run, session) do
    opts = [bridge: run.bridge]

    for {name, value} <- [{"done", 0}, {"last", ""}, {"note", -1}, {"inners", 0}],
        do: {:ok, 1} = set(run, session, name, value)

    :ok = Bridge.define(session, "abandoned", @abandoned, opts)

    for tool <- ["pay", "ship"] do
      :ok = Tools.register(session, tool, fn %{"biz" => biz, "part" => part} -> effect(run, biz, part) end, opts)
    end

    nested = fn %{"biz" => biz} ->
      key = Bridge.current_call().id
      Bridge.call!(session, "workload.inner", [biz], idempotency_key: key, bridge: run.bridge)
    end

    :ok = Tools.register(session, "nested", nested, opts)
  end

  defp set(run, session, name, value), do: SessionStore.set_variable(session, name, value, bridge: run.bridge)

  # The effect. The receipt is the call that it was made for.
  defp effect(run, biz, part) do
    call = Bridge.current_call().id
    # Long enough for a kernel to die meanwhile.
    receive do: (:never -> nil), after: (:rand.uniform(10) -> nil)
    :ets.insert(run.effects, {biz, part, call})
    call
  end

  defp insist(fun) do
    case fun.() do
      {:ok, value} ->
        value

      {:error, %Error{name: name}} when name in @expected ->
        Process.sleep(50)
        insist(fun)
    end
  end

  defp work(run, session, wallet, number) do
    if :atomics.get(run.ending, 1) == 1 and number >= @steps do
      # Who is still there at the end hangs.
      :ets.delete(run.at, session)
      :ok
    else
      {kind, keyed?} = step(run.seed, session, number)
      todo = %{run: run, session: session, wallet: wallet, number: number, kind: kind, keyed?: keyed?}
      attempt(todo, "#{session}-#{number}", 1)
      work(run, session, wallet, number + 1)
    end
  end

  # The same for the same seed.
  defp step(seed, session, number) do
    chance = :rand.seed_s(:exsss, {seed, :erlang.phash2(session), number})
    {kind, chance} = :rand.uniform_s(length(@kinds), chance)
    {keyed, _chance} = :rand.uniform_s(3, chance)
    kind = Enum.at(@kinds, kind - 1)
    {kind, keyed == 1 and kind in [:order, :gather, :deposit]}
  end

  # What has failed is tried again under another name, but with a key under the same: it goes on then where it was.
  defp attempt(todo, name, number) do
    biz = if number == 1, do: name, else: "#{name}##{number}"
    :ets.insert(todo.run.at, {todo.session, todo.kind, biz})

    case perform(todo, biz) do
      {:ok, receipts} ->
        :ets.insert(todo.run.told, {:acked, biz, todo, receipts})
        if todo.keyed?, do: assert(insist(fn -> perform(todo, biz) end) == receipts)

      :unknown ->
        :ets.insert(todo.run.told, {:unknown, biz, todo, nil})

      {:error, %Error{name: error}} when error in @expected ->
        if error in [:circuit_open, :kernel_start_failed], do: Process.sleep(50)
        # Nobody's fault here: it was there when kernels died.
        if error == :quarantined, do: let_out(todo.run.bridge)

        if todo.keyed? do
          attempt(todo, name, number)
        else
          :ets.insert(todo.run.told, {:failed, biz, todo, error})
          drop_what_it_left(todo)
          attempt(todo, name, number + 1)
        end

      {:error, error} ->
        raise error
    end
  end

  # Somebody else may have let it out already.
  defp let_out(bridge) do
    for %{name: name} <- Bridge.quarantine!(bridge: bridge), do: Bridge.release(name, bridge: bridge)
  end

  # An inner command that has a key and lost its kernels could be gone on with; its step begins anew instead.
  defp drop_what_it_left(%{run: run, session: session}) do
    {:ok, interrupted} = Bridge.interrupted(bridge: run.bridge)
    for %{session: ^session, id: id} <- interrupted, do: :ok = Bridge.drop(id, bridge: run.bridge)
  end

  defp perform(%{run: run, session: session} = todo, biz) do
    opts = [bridge: run.bridge] ++ if(todo.keyed?, do: [idempotency_key: biz], else: [])

    case todo.kind do
      :note -> with({:ok, _version} <- set(run, session, "note", todo.number), do: {:ok, []})
      :look -> with({:ok, _note} <- Bridge.call(session, "workload.look", [], opts), do: {:ok, []})
      :deposit -> Bridge.call_method(todo.wallet, "deposit", [biz], opts)
      :stream -> stream(todo, biz)
      :abandoned -> abandon(todo, biz)
      kind -> Bridge.call(session, "workload.#{kind}", [biz], opts)
    end
  end

  defp stream(todo, biz) do
    chunks = Bridge.stream(todo.session, "workload.stream", [biz, @chunks], bridge: todo.run.bridge)
    if Enum.to_list(chunks) == Enum.to_list(0..(@chunks - 1)), do: {:ok, nil}, else: raise("other chunks: #{biz}")
  rescue
    error in Error -> {:error, error}
  end

  # Who asks dies, at any moment: then nobody knows what became of it.
  defp abandon(todo, biz) do
    {pid, monitor} = spawn_monitor(fn -> Bridge.call(todo.session, "abandoned", [biz], bridge: todo.run.bridge) end)
    receive do: ({:DOWN, ^monitor, :process, _, _} -> nil), after: (:rand.uniform(60) -> Process.exit(pid, :kill))
    Process.demonitor(monitor, [:flush])
    :unknown
  end

  # -- what must be true now -------------------------------------------------------------------------

  defp problems(run) do
    told = :ets.tab2list(run.told)
    effects = run.effects |> :ets.tab2list() |> Enum.group_by(&elem(&1, 0))
    acked = for {:acked, biz, todo, receipts} <- told, do: {biz, todo, receipts}

    doubled =
      for {biz, there} <- effects, {part, count} <- Enum.frequencies_by(there, &elem(&1, 1)), count > 1 do
        "#{biz}: #{part} happened #{count} times: #{inspect(there)}"
      end

    calls =
      for {call, count} <- Enum.frequencies_by(:ets.tab2list(run.effects), &elem(&1, 2)), count > 1 do
        "call #{call} was made #{count} times"
      end

    untold =
      for {biz, there} <- effects, not Enum.any?(told, &(elem(&1, 1) == biz)), do: "#{biz}: not told, #{inspect(there)}"

    missing =
      for {biz, todo, receipts} <- acked,
          there = Map.get(effects, biz, []),
          parts = Enum.map(there, &elem(&1, 1)),
          Enum.sort(parts) != @parts[todo.kind] or
            (receipts != nil and Enum.sort(receipts) != there |> Enum.map(&elem(&1, 2)) |> Enum.sort()) do
        "#{biz} was acknowledged with #{inspect(receipts)}, and its effects are #{inspect(there)}"
      end

    by_session = Enum.group_by(told, &elem(&1, 2).session)
    doubled ++ calls ++ untold ++ missing ++ Enum.flat_map(by_session, &of_a_session(run, &1))
  end

  defp of_a_session(run, {session, told}) do
    acked = told |> Enum.filter(&(elem(&1, 0) == :acked)) |> Enum.sort_by(&elem(&1, 2).number)
    written = for {_, biz, %{kind: kind}, _} <- acked, kind in @writes, do: biz
    notes = for {_, _, %{kind: :note, number: number}, _} <- acked, do: number
    deposits = Enum.count(acked, &(elem(&1, 2).kind == :deposit))
    inners = Enum.count(acked, &(elem(&1, 2).kind == :nested))
    failed_inside = Enum.count(told, &(elem(&1, 0) == :failed and elem(&1, 2).kind == :nested))
    opts = [bridge: run.bridge]
    get = fn name -> elem(SessionStore.get_variable(session, name, opts), 1) end
    {:ok, [wallet]} = Bridge.instances(session, opts)
    {:ok, cfg} = Config.fetch(run.bridge)
    {:ok, %{state: %{value: balance}}} = SessionStore.instance(cfg, session, wallet.id)
    {:ok, history} = SessionStore.history(session, "done", opts)
    values = for %{value: value} <- history, do: value
    last = List.last(written) || ""

    for {what, is_now, wanted} <- [
          {"done", get.("done"), length(written)},
          {"last", get.("last"), last},
          {"note", get.("note"), List.last(notes) || -1},
          {"inners", get.("inners") in inners..(inners + failed_inside), true},
          {"the wallet", {balance, wallet.version}, {%{"balance" => deposits}, deposits + 1}},
          {"the history of done", Enum.sort(values),
           Enum.to_list((length(written) - length(values) + 1)..length(written)//1)}
        ],
        is_now != wanted,
        do: "#{session}: #{what} is #{inspect(is_now)}, and must be #{inspect(wanted)}"
  end

  defp now, do: System.monotonic_time(:millisecond)
end
