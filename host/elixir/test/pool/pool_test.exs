defmodule Bridge.PoolTest do
  use ExUnit.Case, async: true

  import ExUnit.CaptureLog

  alias Bridge.{Config, Pool, Telemetry}

  @ask %{session: "s", subject: "f"}

  defp pool(opts \\ []) do
    name = :"#{__MODULE__}.#{System.unique_integer([:positive])}"
    cfg = Config.new!([name: name] ++ opts)
    start_supervised!({Telemetry, cfg}, id: {:telemetry, name})
    start_supervised!({Pool, cfg}, id: {:pool, name})
    cfg
  end

  # Stands for the process of a kernel; passes on what the pool tells it.
  defp kernel(cfg, id, limits \\ %{"max_commands" => 64}) do
    test = self()

    pid =
      spawn_link(fn ->
        Process.flag(:trap_exit, true)
        :ok = Pool.ready(cfg, %{id: id, pid: self(), os_pid: 1, limits: limits})
        send(test, {:ready, id})
        forward(test, id)
      end)

    assert_receive {:ready, ^id}, 60_000
    pid
  end

  defp forward(test, id) do
    receive do
      {:EXIT, ^test, _} -> :ok
      :die -> exit(:normal)
      message -> send(test, {id, message}) && forward(test, id)
    end
  end

  # A process that asks for a place, tells the test what it got, and then does as it is told.
  defp client(cfg, ask \\ %{}, timeout \\ :infinity) do
    test = self()

    spawn(fn ->
      answer = Pool.checkout(cfg, Map.merge(@ask, ask), timeout)
      send(test, {self(), answer})

      receive do
        {:checkin, outcome} ->
          {:ok, %{lease: lease}} = answer
          Pool.checkin(cfg, lease, outcome)
      end
    end)
  end

  # Casts are in order after this.
  defp status(cfg) do
    assert {:ok, status} = Pool.status(cfg)
    status
  end

  defp waits(cfg, count), do: assert_until(fn -> status(cfg).waiting == count end)

  defp assert_until(condition, left \\ 12_000) do
    cond do
      condition.() -> :ok
      left == 0 -> flunk("not within a minute")
      true -> Process.sleep(5) && assert_until(condition, left - 1)
    end
  end

  test "a command gets a place in a kernel, and gives it back" do
    cfg = pool()
    pid = kernel(cfg, "a")
    assert {:ok, %{pid: ^pid, id: "a", lease: lease}} = Pool.checkout(cfg, @ask, 30_000)
    assert %{kernels: [%{id: "a", in_flight: 1, state: :ready}], running: 1} = status(cfg)
    assert :ok = Pool.checkin(cfg, lease, :ok)
    assert :ok = Pool.checkin(cfg, lease, :ok)
    assert %{kernels: [%{in_flight: 0, completed: 1, os_pid: 1}], running: 0} = status(cfg)
  end

  test "the limits of a kernel may have names that are strings or atoms, and may be missing" do
    cfg = pool(concurrency: 7)
    kernel(cfg, "a", %{"max_commands" => 3})
    kernel(cfg, "b", %{max_commands: 4})
    kernel(cfg, "c", %{})
    kernel(cfg, "d", %{"max_commands" => "many"})
    assert %{"a" => 3, "b" => 4, "c" => 7, "d" => 7} = Map.new(status(cfg).kernels, &{&1.id, &1.capacity})
  end

  test "who waits gets the next place that is free" do
    cfg = pool(concurrency: 1)
    kernel(cfg, "a")
    first = client(cfg)
    assert_receive {^first, {:ok, _}}, 60_000
    second = client(cfg)
    waits(cfg, 1)
    send(first, {:checkin, :ok})
    assert_receive {^second, {:ok, %{id: "a"}}}, 60_000
  end

  test "who dies while it has a place gives it up, and so does who dies while it waits" do
    cfg = pool(concurrency: 1)
    kernel(cfg, "a")
    holder = client(cfg)
    assert_receive {^holder, {:ok, _}}, 60_000
    dead = client(cfg)
    waits(cfg, 1)
    Process.exit(dead, :kill)
    waits(cfg, 0)
    heir = client(cfg)
    waits(cfg, 1)
    Process.exit(holder, :kill)
    assert_receive {^heir, {:ok, _}}, 60_000
    refute_received {^dead, _}
  end

  test "a deadline that passes while a command waits is an error, and the command is out of the line" do
    cfg = pool()
    assert {:error, %Bridge.Error{name: :deadline_exceeded} = error} = Pool.checkout(cfg, @ask, 20)
    assert error.message =~ "waited for a kernel"
    assert status(cfg).waiting == 0
    kernel(cfg, "a")
    assert %{running: 0} = status(cfg)
  end

  test "a place that comes in time is not taken away when the deadline passes" do
    cfg = pool()
    waiting = client(cfg, %{}, 600_000)
    waits(cfg, 1)
    kernel(cfg, "a")
    assert_receive {^waiting, {:ok, %{lease: lease}}}, 60_000
    # As its timer would, had it fired in the meantime.
    send(Config.process(cfg.name, :pool), {:out_of_time, lease})
    assert %{running: 1} = status(cfg)
  end

  test "a kernel whose process ends gets nothing more, however it ended" do
    cfg = pool()
    a = kernel(cfg, "a")
    b = kernel(cfg, "b")
    Process.unlink(a)
    Process.exit(a, :kill)
    send(b, :die)
    assert_until(fn -> status(cfg).kernels == [] end)
    kernel(cfg, "c")
    :ok = Pool.down(cfg, "c", :gone)
    assert status(cfg).kernels == []
    :ok = Pool.down(cfg, "c", :gone)
    assert status(cfg).kernels == []
  end

  test "a kernel that is ready again is one kernel" do
    cfg = pool(concurrency: 1)
    pid = kernel(cfg, "a")
    :ok = Pool.ready(cfg, %{id: "a", pid: pid, os_pid: 1, limits: %{}})
    assert [%{id: "a"}] = status(cfg).kernels
    Process.unlink(pid)
    Process.exit(pid, :kill)
    assert_until(fn -> status(cfg).kernels == [] end)
  end

  test "draining is told to the kernel's process when it is idle" do
    cfg = pool()
    kernel(cfg, "a")
    assert {:ok, %{lease: lease}} = Pool.checkout(cfg, @ask, 30_000)
    assert :ok = Pool.drain(cfg, "a")
    assert %{kernels: [%{state: :draining}]} = status(cfg)
    refute_received {"a", _}
    Pool.checkin(cfg, lease, :ok)
    assert_receive {"a", {:bridge_drained, "a"}}, 60_000
    assert {:error, %Bridge.Error{name: :not_found, remedy: "There are: a."}} = Pool.drain(cfg, "b")
  end

  test "a kernel that has run as many commands as it should is told so, and telemetry with it" do
    cfg = pool(recycle: %{commands: 1})
    attach(cfg, [[:bridge, :pool, :recycle]])
    kernel(cfg, "a")
    {:ok, %{lease: lease}} = Pool.checkout(cfg, @ask, 30_000)
    Pool.checkin(cfg, lease, :ok)
    assert_receive {"a", {:bridge_recycle, "commands"}}, 60_000

    assert_receive {[:bridge, :pool, :recycle], %{completed: 1, rss: 0}, %{kernel: "a", pid: 1, reason: "commands"}},
                   5_000
  end

  test "a kernel that has lived long enough is told so, although nothing runs" do
    cfg = pool(recycle: %{age: 20})
    kernel(cfg, "a")
    assert_receive {"a", {:bridge_recycle, "age"}}, 60_000
  end

  test "memory and silence are what the kernel's process says" do
    cfg = pool(recycle: %{rss_bytes: 1_000})
    kernel(cfg, "a")
    :ok = Pool.report(cfg, "a", %{unresponsive: true, rss: 999})
    assert %{kernels: [%{state: :unresponsive, rss: 999}]} = status(cfg)
    :ok = Pool.report(cfg, "a", %{unresponsive: false, rss: 1_001})
    assert_receive {"a", {:bridge_recycle, "rss"}}, 60_000
    :ok = Pool.report(cfg, "nobody", %{rss: 1})
  end

  test "the queue's end is an error, and telemetry" do
    cfg = pool(queue: 0)
    attach(cfg, [[:bridge, :pool, :queue, :reject]])
    assert {:error, %Bridge.Error{name: :queue_full, retryable: true}} = Pool.checkout(cfg, @ask, :infinity)
    assert_receive {_, %{waiting: 0, session_waiting: 0}, %{session: "s", subject: "f"}}, 60_000
  end

  test "a command that ends kernel after kernel is held back, others are not, and telemetry says so" do
    cfg = pool(breaker: %{command_failures: 2})
    attach(cfg, [[:bridge, :pool, :breaker, :open]])
    for id <- ["a", "b"], do: dies_of_it(cfg, id)
    kernel(cfg, "c")
    assert {:error, %Bridge.Error{name: :circuit_open}} = Pool.checkout(cfg, @ask, 30_000)
    assert_receive {_, %{failures: 2, cooldown: ticks}, %{subject: "f", kernel: "", reason: "died"}}, 60_000
    assert System.convert_time_unit(ticks, :native, :millisecond) == 10_000
    assert {:ok, _} = Pool.checkout(cfg, %{@ask | subject: "g"}, 30_000)
  end

  test "after a while one is tried, and if that goes well the command runs again" do
    cfg = pool(breaker: %{command_failures: 1, cooldown: 1})
    attach(cfg, [[:bridge, :pool, :breaker, :close]])
    dies_of_it(cfg, "a")
    kernel(cfg, "b")
    assert_until(fn -> match?({:ok, _}, send(self(), Pool.checkout(cfg, @ask, 30_000))) end)
    assert_receive {:ok, %{lease: lease}}
    assert {:error, %Bridge.Error{message: message}} = Pool.checkout(cfg, @ask, 30_000)
    assert message =~ "one is tried now"
    Pool.checkin(cfg, lease, :ok)
    assert_receive {_, _, %{subject: "f", kernel: "", reason: "ok"}}, 60_000
    assert {:ok, _} = Pool.checkout(cfg, @ask, 30_000)
  end

  defp dies_of_it(cfg, id) do
    pid = kernel(cfg, id)
    assert {:ok, %{lease: lease, id: ^id}} = Pool.checkout(cfg, @ask, 30_000)
    Pool.down(cfg, id, :died)
    Pool.checkin(cfg, lease, :died)
    send(pid, :die)
  end

  test "without settings the breaker is as the Python host's" do
    cfg = pool()

    for n <- 1..5 do
      kernel(cfg, "k#{n}")
      {:ok, %{lease: lease, id: id}} = Pool.checkout(cfg, @ask, 30_000)
      Pool.down(cfg, id, :died)
      Pool.checkin(cfg, lease, :died)
    end

    assert {:error, %Bridge.Error{name: :circuit_open}} = Pool.checkout(cfg, @ask, 30_000)
  end

  test "each place is told to telemetry, with the trace of its command" do
    cfg = pool(routing: :least_loaded)
    attach(cfg, [[:bridge, :pool, :route]])
    kernel(cfg, "a")
    trace = %{trace_id: String.duplicate("a", 32), parent_span_id: String.duplicate("b", 16)}
    {:ok, _} = Pool.checkout(cfg, Map.put(@ask, :trace, trace), 30_000)
    assert_receive {_, %{queue: 0, candidates: 1, expected: 0, system_time: _}, said}, 60_000
    assert %{kernel: "a", strategy: "least_loaded", subject: "f", session: "s", parent_span_id: "bbbb" <> _} = said
  end

  test "a routing function chooses; when it fails that is logged once and the least loaded kernel is taken" do
    test = self()
    cfg = pool(routing: fn ask, candidates -> send(test, ask.subject) && List.first(candidates).id end)
    kernel(cfg, "a")
    kernel(cfg, "b")
    assert {:ok, _} = Pool.checkout(cfg, @ask, 30_000)
    assert_received "f"
    assert status(cfg).strategy == "function"
    cfg = pool(routing: fn _, _ -> raise "out of order" end)
    kernel(cfg, "a")
    kernel(cfg, "b")

    log =
      capture_log(fn ->
        for _ <- 1..5, do: assert({:ok, _} = Pool.checkout(cfg, @ask, 30_000))
        status(cfg)
      end)

    assert [_, _] = String.split(log, "out of order")
  end

  test "when no kernel can be started, who waits is told why at once" do
    cfg = pool()
    waiting = client(cfg)
    waits(cfg, 1)
    Pool.hopeless(cfg, Bridge.Error.new(:kernel_start_failed, "there is no Python"))
    assert_receive {^waiting, {:error, %Bridge.Error{message: "there is no Python"}}}, 60_000
    Pool.hopeless(cfg, nil)
    kernel(cfg, "a")
    assert {:ok, _} = Pool.checkout(cfg, @ask, 30_000)
  end

  test "closing refuses who waits and who comes, and waits for what runs" do
    cfg = pool(concurrency: 1)
    kernel(cfg, "a")
    running = client(cfg)
    assert_receive {^running, {:ok, _}}, 60_000
    waiting = client(cfg)
    waits(cfg, 1)
    closing = Task.async(fn -> Pool.close(cfg, :infinity) end)
    assert_receive {^waiting, {:error, %Bridge.Error{name: :host_closed}}}, 60_000
    assert {:error, %Bridge.Error{name: :host_closed}} = Pool.checkout(cfg, @ask, :infinity)
    assert Task.yield(closing, 0) == nil
    assert Pool.close(cfg, 10) == :timeout
    send(running, {:checkin, :ok})
    assert Task.await(closing, 60_000) == :ok
    assert Pool.close(cfg, 10) == :ok
  end

  test "closing does not wait for a command whose process has died" do
    cfg = pool()
    kernel(cfg, "a")
    running = client(cfg)
    assert_receive {^running, {:ok, _}}, 60_000
    closing = Task.async(fn -> Pool.close(cfg, :infinity) end)
    assert_until(fn -> status(cfg).closed end)
    Process.exit(running, :kill)
    assert Task.await(closing, 60_000) == :ok
  end

  test "without a pool every question is answered that the host is closed" do
    cfg = Config.new!(name: :"#{__MODULE__}.Nowhere")
    assert {:error, %Bridge.Error{name: :host_closed}} = Pool.checkout(cfg, @ask, 30_000)
    assert {:error, %Bridge.Error{name: :host_closed}} = Pool.status(cfg)
    assert :ok = Pool.close(cfg, 10)
    assert :ok = Pool.checkin(cfg, make_ref(), :ok)
    refute Pool.quarantined?(cfg, "digest")
    assert Pool.quarantine(cfg) == []
  end

  test "who waits when the pool ends is told so" do
    cfg = pool()
    waiting = client(cfg)
    waits(cfg, 1)
    stop_supervised!({:pool, cfg.name})
    assert_receive {^waiting, {:error, %Bridge.Error{name: :host_closed}}}, 60_000
  end

  test "many processes at once: every place is given back, and no kernel has more than it takes" do
    cfg = pool(concurrency: 3, queue: 10_000)
    kernel(cfg, "a")
    kernel(cfg, "b")
    counts = :counters.new(2, [])
    index = %{"a" => 1, "b" => 2}

    1..400
    |> Task.async_stream(
      fn n ->
        {:ok, %{lease: lease, id: id}} = Pool.checkout(cfg, %{@ask | session: "s#{rem(n, 7)}"}, :infinity)
        :counters.add(counts, index[id], 1)
        assert :counters.get(counts, index[id]) <= 3
        :counters.sub(counts, index[id], 1)
        # One in ten goes without a word.
        if rem(n, 10) != 0, do: Pool.checkin(cfg, lease, :ok)
      end,
      max_concurrency: 100,
      ordered: false
    )
    |> Stream.run()

    assert_until(fn -> match?(%{running: 0, waiting: 0}, status(cfg)) end)
  end

  test "a message of nobody's and a lease of nobody's change nothing" do
    cfg = pool()
    kernel(cfg, "a")
    Pool.checkin(cfg, make_ref(), :ok)
    assert %{running: 0, kernels: [%{in_flight: 0, completed: 0}]} = status(cfg)
  end

  # -- quarantine -----------------------------------------------------------------------------

  test "a command in quarantine is named, with its remedy, until it is let out" do
    cfg = pool()
    assert :ok = Pool.check_quarantine(cfg, "digest")
    info = %{name: "m.f", session: "s", kernels: 3, last: "signal 9"}
    assert %Bridge.Error{name: :quarantined} = error = Pool.quarantine(cfg, "digest", info)
    assert error.message == "m.f ended 3 kernels, the last one with nothing else running on it: signal 9"
    assert error.remedy == "Mend it, then let it out: Bridge.release(\"m.f\")."
    assert Pool.quarantined?(cfg, "digest")
    refute Pool.quarantined?(cfg, "another")
    assert {:error, %Bridge.Error{name: :quarantined, message: message}} = Pool.check_quarantine(cfg, "digest")
    assert message == "m.f is in quarantine: it ended 3 kernels"
    assert [%{name: "m.f", session: "s", since: %DateTime{}}] = Pool.quarantine(cfg)
    assert {:error, %Bridge.Error{name: :not_found, remedy: "There is: m.f."}} = Pool.release(cfg, "m.g")
    assert :ok = Pool.release(cfg, "m.f")
    assert :ok = Pool.check_quarantine(cfg, "digest")
    assert {:error, %Bridge.Error{remedy: "There is: none."}} = Pool.release(cfg, "m.f")
  end

  test "letting a name out lets out every command of that name, and the oldest make room" do
    cfg = pool()
    add = &Pool.quarantine(cfg, &1, %{name: &2, session: "s", kernels: 3, last: "x"})
    for n <- 1..1_001, do: add.("d#{n}", "f#{rem(n, 2)}")
    assert length(Pool.quarantine(cfg)) == 1_000
    refute Pool.quarantined?(cfg, "d1")
    assert :ok = Pool.release(cfg, "f0")
    assert length(Pool.quarantine(cfg)) == 500
    assert Pool.quarantine(cfg) |> Enum.map(& &1.name) |> Enum.uniq() == ["f1"]
  end

  defp attach(cfg, events) do
    test = self()
    id = "#{cfg.name}-#{System.unique_integer([:positive])}"

    handler = fn event, measured, said, _ ->
      if said.bridge == cfg.name, do: send(test, {event, measured, said})
    end

    :ok = Telemetry.attach_many(id, events, handler, nil)
    on_exit(fn -> Telemetry.detach(id) end)
  end
end
