defmodule Bridge.TelemetryTest do
  # Not async: handlers are of the whole BEAM, as those of :telemetry are.
  use ExUnit.Case, async: false

  import ExUnit.CaptureLog

  alias Bridge.Telemetry
  alias Bridge.Telemetry.{Catalogue, Handlers, Histogram, Trace}

  doctest Trace

  @command %{
    command: "function.call",
    subject: "total",
    session: "s",
    command_id: "c1",
    trace_id: "t",
    span_id: "p",
    parent_span_id: nil
  }

  setup context do
    name = Module.concat(__MODULE__, "B#{context.line}")
    pid = start_supervised!({Telemetry, %{name: name}})
    on_exit(fn -> for {id, _name} <- Handlers.list([]), do: Telemetry.detach(id) end)
    {:ok, bridge: name, owner: pid}
  end

  defp stop(bridge, duration_ms, more \\ %{}) do
    measured = %{duration: System.convert_time_unit(duration_ms, :millisecond, :native), attempts: 1}
    Telemetry.execute(bridge, [:bridge, :command, :stop], measured, Map.merge(@command, more))
  end

  defp batch(events, more \\ %{}) do
    shared = %{
      "command" => "function.call",
      "subject" => "total",
      "session" => "s",
      "kernel" => "whatever it says",
      "attempt" => 1,
      "trace_id" => "t",
      "span_id" => "x",
      "parent_span_id" => "p"
    }

    Map.merge(%{"command" => 2, "metadata" => shared, "events" => events, "dropped" => 0, "settled" => true}, more)
  end

  defp event(name, numbers \\ %{}, said \\ %{}) do
    %{"name" => String.split(name, "."), "measurements" => numbers, "metadata" => said}
  end

  defp tell_me(id, prefix) do
    me = self()
    Telemetry.attach(id, prefix, fn name, numbers, said, config -> send(me, {config, name, numbers, said}) end, id)
  end

  describe "what a kernel tells, which may be anybody's," do
    defp user(numbers, said), do: batch([event("bridge.user.mine", numbers, said)])

    test "takes no more room than an event may", %{bridge: bridge} do
      long = String.duplicate("x", 16_384)
      many = for n <- 1..1_000, into: %{}, do: {"k#{n}", String.duplicate("v", 1_000)}

      Telemetry.ingest(
        bridge,
        [user(%{"n" => 1, "huge" => Integer.pow(10, 4_000)}, %{"a" => long, (long <> "x") => 1})],
        "k"
      )

      Telemetry.ingest(bridge, [user(%{"n" => 1}, many), user(%{}, %{"a" => long <> "x"})], "k")
      Telemetry.ingest(bridge, [batch([event("bridge.user." <> long <> "x")])], "k")
      Telemetry.ingest(bridge, [batch([event("bridge.execution.progress", %{}, %{"message" => long <> "x"})])], "k")

      assert [first, second, third] = for(%{metadata: %{name: "mine"}} = event <- Telemetry.events(bridge), do: event)
      assert first.measurements["n"] == 1
      refute is_map_key(first.measurements, "huge")
      assert first.metadata["a"] == long
      assert Enum.filter(Map.keys(first.metadata), &is_binary/1) == ["a"]
      assert second.metadata |> Map.keys() |> Enum.count(&is_binary/1) == 65
      refute is_map_key(third.metadata, "a")
      assert Telemetry.summary(bridge).refused == 2
    end

    test "breaks no figure: no number of it is too large for one", %{bridge: bridge} do
      for rss <- [Integer.pow(10, 40), -Integer.pow(10, 40)] do
        :ok =
          Telemetry.execute(bridge, [:bridge, :kernel, :memory], %{rss: rss, in_flight: 0, round_trip: 1}, %{
            kernel: "k",
            pid: 1
          })
      end

      assert [%{rss: 0, peak: peak}] = Telemetry.kernels(bridge)
      assert peak == 0xFFFF_FFFF_FFFF
    end
  end

  describe "handlers" do
    test "hear of events whose names begin so, in the process that emits, with the bridge's name", %{bridge: bridge} do
      :ok = tell_me("mine", [:bridge, :command])
      stop(bridge, 5)
      Telemetry.execute(bridge, [:bridge, :cache, :miss], %{}, %{})
      assert_received {"mine", [:bridge, :command, :stop], %{attempts: 1}, %{subject: "total", bridge: ^bridge}}
      refute_received {"mine", [:bridge, :cache, :miss], _, _}
    end

    test "have ids of their own, and are detached by them", %{bridge: bridge} do
      :ok = tell_me("mine", [:bridge, :command])
      assert {:error, :already_exists} = tell_me("mine", [:bridge, :pool])
      assert :ok = Telemetry.detach("mine")
      assert {:error, :not_found} = Telemetry.detach("mine")
      stop(bridge, 5)
      refute_received {"mine", _, _, _}
    end

    test "that fail are detached with a warning and an event, and break nobody", %{bridge: bridge} do
      :ok = tell_me("after", [:bridge])

      for {id, fun} <- [raises: fn -> raise "no" end, throws: fn -> throw(:no) end, exits: fn -> exit(:no) end] do
        :ok = Telemetry.attach(id, [:bridge, :command, :stop], fn _, _, _, _ -> fun.() end)
      end

      log = capture_log(fn -> assert :ok = stop(bridge, 5) end)
      for id <- [:raises, :throws, :exits], do: assert(log =~ "telemetry handler #{inspect(id)} failed")
      assert_received {"after", [:bridge, :telemetry, :detach], %{}, %{handler: ":raises", error: "RuntimeError"}}
      assert_received {"after", [:bridge, :telemetry, :detach], %{}, %{handler: ":throws", error: "throw"}}
      assert capture_log(fn -> stop(bridge, 5) end) == ""
    end

    test "attached at once by many processes are all there" do
      ids = for n <- 1..50, do: {:at_once, n}

      results =
        Task.async_stream(ids, &Telemetry.attach(&1, [:bridge, :user], fn _, _, _, _ -> :ok end), max_concurrency: 50)

      assert Enum.all?(results, &(&1 == {:ok, :ok}))
      assert Enum.sort(for {{:at_once, _} = id, _} <- Handlers.list([:bridge, :user]), do: id) == ids
    end
  end

  describe "figures" do
    test "of what many processes emit at once are exact", %{bridge: bridge} do
      1..20
      |> Task.async_stream(fn n -> for i <- 1..500, do: stop(bridge, rem(i, 10) + 1, %{subject: "f#{rem(n, 2)}"}) end)
      |> Stream.run()

      rows = Telemetry.latencies(bridge)
      assert Enum.map(rows, & &1.count) == [5_000, 5_000]
      assert Enum.map(rows, & &1.total) == List.duplicate(5_000 * 5_500_000, 2)
      assert [%{low: 1_000_000, high: 10_000_000} | _] = rows
    end

    test "say percentiles to 3.2 %, whatever the values" do
      for top <- [10, 1_000, 3_600_000] do
        histogram = Histogram.new()
        values = for n <- 1..1_000, do: n * top * 1_000
        Enum.each(values, &Histogram.add(histogram, &1))
        figures = Histogram.figures(histogram, [0.0, 0.5, 0.95, 0.99, 1.0])
        assert {figures.count, figures.total} == {1_000, Enum.sum(values)}
        assert {figures.low, figures.high} == {top * 1_000, top * 1_000_000}

        for {found, rank} <- Enum.zip(figures.percentiles, [1, 500, 950, 990, 1_000]) do
          assert_in_delta found, rank * top * 1_000, rank * top * 1_000 * 0.033
        end
      end
    end

    test "of no value, of none that is sensible, and of the greatest break nothing" do
      assert Histogram.figures(Histogram.new(), [0.5]).percentiles == [nil]
      histogram = Histogram.new()
      for ns <- [0, 1, 1024, 1025, 0x7FFFFFFFFFFF, 1_000_000_000_000_000], do: Histogram.add(histogram, ns)
      assert %{count: 6, low: 0, high: 1_000_000_000_000_000} = Histogram.figures(histogram, [0.5])
    end

    test "count errors by type, cached results, attempts", %{bridge: bridge} do
      failed = fn error, subject ->
        said = Map.merge(@command, %{error: error, subject: subject})
        Telemetry.execute(bridge, [:bridge, :command, :exception], %{duration: 1, attempts: 3}, said)
      end

      for _ <- 1..3, do: failed.("ValueError", "f")
      failed.("ValueError", "g")
      failed.("KeyError", "f")
      Telemetry.execute(bridge, [:bridge, :command, :stop], %{duration: 1, attempts: 0}, %{@command | subject: "f"})

      assert [
               %{error: "ValueError", of: :command, count: 4, about: [{"f", 3}, {"g", 1}]},
               %{error: "KeyError", count: 1}
             ] = Telemetry.errors(bridge)

      assert %{errors: 4, cached: 1, retries: 8, count: 5} =
               Enum.find(Telemetry.latencies(bridge), &(&1.command == "f"))
    end

    test "are bounded, and their sums stay exact", %{bridge: bridge} do
      for n <- 1..1_100, do: stop(bridge, 1, %{subject: "f#{n}"})
      for n <- 1..600, do: Telemetry.execute(bridge, [:bridge, :kernel, :memory], %{rss: n}, %{kernel: "k#{n}"})
      rows = Telemetry.latencies(bridge)
      assert length(rows) == 1_001
      assert List.last(rows).command == "(others)"
      assert Enum.sum(Enum.map(rows, & &1.count)) == 1_100
      assert length(Telemetry.kernels(bridge)) == 500
    end

    test "of kernels say how they lived and died", %{bridge: bridge} do
      now = System.system_time()
      start = %{kernel: "k1", pid: 7, spare: false, deaths: 0}
      Telemetry.execute(bridge, [:bridge, :kernel, :start], %{duration: 5, system_time: now}, start)

      for rss <- [10, 30, 20],
          do: Telemetry.execute(bridge, [:bridge, :kernel, :memory], %{rss: rss}, %{kernel: "k1", pid: 7})

      assert [%{state: :alive, pid: 7, rss: 20, peak: 30, started: ^now}] = Telemetry.kernels(bridge)
      stopped = %{kernel: "k1", pid: 7, expected: false, exit_code: -9, reason: "killed"}

      log =
        capture_log(fn ->
          Telemetry.execute(bridge, [:bridge, :kernel, :stop], %{duration: 9, system_time: now + 9, lost: 2}, stopped)
        end)

      assert [%{state: :died, exit_code: -9, lost: 2, reason: "killed", started: ^now}] = Telemetry.kernels(bridge)
      assert log =~ "kernel k1 died, exit code -9, 2 commands lost: killed"
    end

    test "of models add up tokens and cost; what a cache answered says nothing of speed", %{bridge: bridge} do
      lm = fn numbers, said ->
        Telemetry.execute(bridge, [:bridge, :dspy, :lm, :stop], numbers, Map.put(said, :model, "openai/x"))
      end

      lm.(%{duration: 1_000_000, input_tokens: 10, output_tokens: 5, cost: 0.25}, %{})
      lm.(%{duration: 10, tokens: 15, cost: 0.0}, %{cache_hit: true})
      assert [%{calls: 2, cache_hits: 1, tokens: 30, input_tokens: 10, cost: 0.25, p50: p50}] = Telemetry.models(bridge)
      assert_in_delta p50, 1_000_000, 33_000
    end

    test "of the last minute count what has just ended", %{bridge: bridge} do
      for _ <- 1..7, do: stop(bridge, 2)
      recent = Telemetry.recent(bridge)
      assert Enum.sum(recent.commands) == 7
      assert length(recent.commands) == 60
      assert_in_delta recent.p50, 2_000_000, 66_000
    end

    test "that are not as the catalogue says are not counted, and break nothing", %{bridge: bridge} do
      for numbers <- [%{}, %{duration: "x", attempts: 1}, %{duration: 1.5, attempts: nil}] do
        assert :ok = Telemetry.execute(bridge, [:bridge, :command, :stop], numbers, @command)
      end

      assert Telemetry.latencies(bridge) == []
    end

    test "show themselves as tables", %{bridge: bridge} do
      for _ <- 1..1_200, do: stop(bridge, 3)
      shown = inspect(Telemetry.summary(bridge))
      assert shown =~ "#Bridge.Telemetry<1,200 events"
      assert shown =~ ~r/total +1,200 +0 +3\.\d ms/
    end
  end

  test "the last 10,000 events are remembered, in order, of all that processes emit at once", %{bridge: bridge} do
    1..10 |> Task.async_stream(fn n -> for i <- 1..1_100, do: stop(bridge, 1, %{by: n, i: i}) end) |> Stream.run()
    events = Telemetry.events(bridge)
    assert length(events) == 10_000

    for {_by, mine} <- Enum.group_by(events, & &1.metadata.by) do
      assert Enum.map(mine, & &1.metadata.i) == Enum.sort(Enum.map(mine, & &1.metadata.i))
    end

    assert Telemetry.events(bridge, [:bridge, :kernel]) == []
  end

  test "who emits is not hurt when the owner of the tables is killed", %{bridge: bridge, owner: owner} do
    monitor = Process.monitor(owner)
    Process.exit(owner, :kill)
    assert_receive {:DOWN, ^monitor, :process, _, :killed}
    assert :ok = stop(bridge, 1)
    assert :ok = Telemetry.ingest(bridge, [batch([])], "k")
    assert Telemetry.params(bridge, "s") in [nil, %{}]
    assert is_list(Telemetry.events(bridge))
    assert :ok = Telemetry.execute(:never_started, [:bridge, :command, :stop], %{}, %{})
  end

  describe "switches" do
    test "off: nothing is recorded here, and kernels are told", %{bridge: bridge} do
      :ok = tell_me("mine", [:bridge])
      :ok = Telemetry.disable([:bridge, :command], bridge: bridge)
      stop(bridge, 1)
      refute_received {"mine", _, _, _}
      assert Telemetry.latencies(bridge) == []
      assert Telemetry.params(bridge, "s") == %{"off" => [["bridge", "command"]]}
      refute Telemetry.silent?(bridge)
      :ok = Telemetry.disable([:bridge], bridge: bridge)
      assert Telemetry.silent?(bridge)
      :ok = Telemetry.enable([:bridge], bridge: bridge)
      assert Telemetry.params(bridge, "s") == nil
      stop(bridge, 1)
      assert_received {"mine", _, _, _}
    end

    test "captures are of one session, of known kinds, and forgotten with it", %{bridge: bridge} do
      :ok = Telemetry.capture("s", [:results, :arguments], bridge: bridge)
      assert Telemetry.params(bridge, "s") == %{"capture" => ["arguments", "results"]}
      assert Telemetry.params(bridge, "other") == nil
      assert_raise ArgumentError, fn -> Telemetry.capture("s", [:everything], bridge: bridge) end
      :ok = Telemetry.forget("s", bridge: bridge)
      assert Telemetry.params(bridge, "s") == nil
    end

    test "sampling is of traces; what is not sampled is counted", %{bridge: bridge} do
      :ok = Telemetry.sampling(0, bridge: bridge)
      refute Telemetry.sampled?(bridge)
      assert String.ends_with?(Trace.traceparent(Telemetry.trace(bridge)), "-00")
      Telemetry.count(bridge, [:bridge, :command, :stop], %{duration: 1_000_000, attempts: 1}, @command)
      assert Telemetry.events(bridge) == []
      assert [%{count: 1}] = Telemetry.latencies(bridge)
      :ok = Telemetry.sampling(1, bridge: bridge)
      assert Telemetry.sampled?(bridge)
    end

    test "the log can be turned off, or down", %{bridge: bridge} do
      fail = fn ->
        Telemetry.execute(
          bridge,
          [:bridge, :command, :exception],
          %{duration: 1, attempts: 1},
          Map.put(@command, :error, "ValueError")
        )
      end

      assert capture_log(fail) =~ "total failed in session s: ValueError"
      :ok = Telemetry.log(:warning, bridge: bridge)
      assert capture_log(fail) == ""
      retry = fn -> Telemetry.execute(bridge, [:bridge, :execution, :retry], %{attempt: 2, recorded: 0}, @command) end
      assert capture_log(retry) =~ "attempt 2"
      :ok = Telemetry.log(false, bridge: bridge)
      assert capture_log(retry) == ""
    end
  end

  describe "what a kernel displays" do
    test "becomes events, and the kernel is the one that sent it", %{bridge: bridge} do
      :ok = tell_me("mine", [:bridge, :execution])

      stop =
        event("bridge.execution.stop", %{"duration" => 9}, %{"success" => true, "error" => nil, "kernel" => "forged"})

      assert :ok = Telemetry.ingest(bridge, [batch([stop])], "k7")

      assert_received {"mine", [:bridge, :execution, :stop], %{duration: _},
                       %{kernel: "k7", success: true, parent_span_id: "p"}}

      assert [%{kernel: "k7", commands: 1}] = Telemetry.kernels(bridge)
    end

    test "is counted where it is unknown or impossible, and never breaks anything", %{bridge: bridge} do
      rubbish = [
        nil,
        "x",
        [nil],
        [%{}],
        [%{"metadata" => 1, "events" => 2}],
        [batch([nil, 1, %{"name" => "x"}, event("bridge.kernel.stop"), event("bridge.tomorrow")])],
        [batch([%{"name" => [1, nil, %{}], "measurements" => %{}, "metadata" => %{}}])],
        [batch(%{"not" => "a list"})],
        [batch([], %{"dropped" => "many"})]
      ]

      for batches <- rubbish, do: assert(:ok = Telemetry.ingest(bridge, batches, "k"))
      summary = Telemetry.summary(bridge)
      assert {summary.events, summary.unknown, summary.refused} == {0, 2, 10}
    end

    test "says how much was dropped", %{bridge: bridge} do
      Telemetry.ingest(bridge, [batch([], %{"dropped" => 12})], "k")

      assert [%{name: [:bridge, :telemetry, :drop], measurements: %{events: 12}, metadata: said}] =
               Telemetry.events(bridge)

      assert Catalogue.problem([:bridge, :telemetry, :drop], %{events: 12}, said) == nil
    end

    test "shows no secret, however it came there", %{bridge: bridge} do
      told =
        event("bridge.user.my-sk-12345", %{"sk-12345" => 1}, %{
          "note" => "it is sk-12345678, or sk-12345",
          "sk-12345" => "x",
          "json" => ~S({"key": "a\"b-long-one"})
        })

      secrets = ["sk-12345", "sk-12345678", ~S(a"b-long-one), "it", ""]
      Telemetry.ingest(bridge, [batch([told])], "k", secrets: secrets)
      assert [event] = Telemetry.events(bridge)
      refute inspect(event) =~ "sk-123"
      assert event.metadata["note"] == "it is ***, or ***"
      assert event.metadata["json"] == ~S({"key": "***"})
      Telemetry.ingest(bridge, [batch([told]), %{}], "k", secrets: fn "s" -> secrets end)
      assert length(Telemetry.events(bridge)) == 2
      refute inspect(Telemetry.events(bridge)) =~ "sk-123"
    end

    test "does not keep the message that it came in", %{bridge: bridge} do
      # Long enough that it would not be copied with the event.
      message = :binary.copy("x", 1_000_000)
      subject = binary_part(message, 1_000, 100)
      shared = %{batch([])["metadata"] | "subject" => subject}
      Telemetry.ingest(bridge, [batch([event("bridge.execution.progress")], %{"metadata" => shared})], "k")
      assert [%{metadata: %{subject: kept}}] = Telemetry.events(bridge)
      assert :binary.referenced_byte_size(kept) == 100
    end
  end

  describe "spans" do
    test "measure what is done within, and are the parents of it", %{bridge: bridge} do
      result =
        Telemetry.span(
          "outer",
          fn -> Telemetry.span("inner", fn -> Telemetry.traceparent() end, bridge: bridge) end,
          metadata: %{rows: 3},
          bridge: bridge
        )

      assert [o1, i1, i2, o2] = Telemetry.events(bridge)
      assert Enum.map([o1, i1, i2, o2], &List.last(&1.name)) == [:start, :start, :stop, :stop]
      assert {o1.metadata.name, o1.metadata.rows, o1.metadata.parent_span_id} == {"outer", 3, nil}
      assert i1.metadata.parent_span_id == o1.metadata.span_id
      assert i1.metadata.trace_id == o1.metadata.trace_id
      assert result == "00-#{i1.metadata.trace_id}-#{i1.metadata.span_id}-01"
      assert Telemetry.traceparent() == nil

      for event <- [o1, i1, i2, o2],
          do: assert(Catalogue.problem(event.name, event.measurements, event.metadata) == nil)
    end

    test "go on with the trace of whoever asked, sampled or not", %{bridge: bridge} do
      header = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
      in_trace = fn name, header -> Telemetry.span(name, fn -> :ok end, traceparent: header, bridge: bridge) end
      in_trace.("one", header)

      assert [%{metadata: %{trace_id: "0af7651916cd43dd8448eb211c80319c", parent_span_id: "b7ad6b7169203331"}}, _] =
               Telemetry.events(bridge)

      in_trace.("two", String.replace_suffix(header, "01", "00"))
      assert length(Telemetry.events(bridge)) == 2
      assert_raise ArgumentError, fn -> in_trace.("x", "00-zz") end
    end

    test "end with what was raised, thrown or exited with", %{bridge: bridge} do
      assert_raise KeyError, fn -> Telemetry.span("x", fn -> raise KeyError, key: :a end, bridge: bridge) end
      assert catch_throw(Telemetry.span("y", fn -> throw(:ball) end, bridge: bridge)) == :ball
      assert catch_exit(Telemetry.span("z", fn -> exit(:door) end, bridge: bridge)) == :door
      ended = for %{name: [_, _, :exception], metadata: said} <- Telemetry.events(bridge), do: said.error
      assert ended == ["KeyError", "throw", "exit"]
      assert Trace.current() == nil
    end
  end

  describe "a waterfall" do
    defp span_of(bridge, prefix, id, parent, from_ms, ms, said) do
      at = System.convert_time_unit(1_000_000 + from_ms, :millisecond, :native)
      said = Map.merge(said, %{trace_id: "t", span_id: id, parent_span_id: parent})
      Telemetry.execute(bridge, prefix ++ [:start], %{system_time: at}, said)
      last = if said[:error], do: :exception, else: :stop
      took = %{duration: System.convert_time_unit(ms, :millisecond, :native), attempts: 1}
      Telemetry.execute(bridge, prefix ++ [last], took, said)
    end

    test "shows all that a trace goes through, each beneath what it is part of", %{bridge: bridge} do
      span_of(bridge, [:bridge, :tool], "d", "c", 30, 40, %{tool: "double", session: "s", error: "ValueError"})
      span_of(bridge, [:bridge, :callback], "c", "b", 20, 60, %{method: "tool.call", about: "double"})
      span_of(bridge, [:bridge, :execution], "b", "a", 10, 80, %{kernel: "e4a50d", subject: "total"})
      span_of(bridge, [:bridge, :command], "a", "outside", 0, 100, %{subject: "total", session: "s", command_id: "c1"})
      assert {:ok, waterfall} = Telemetry.waterfall(nil, bridge: bridge)
      assert {:ok, ^waterfall} = Telemetry.waterfall("c1", bridge: bridge)
      assert {:ok, ^waterfall} = Telemetry.waterfall("t", bridge: bridge)

      assert Enum.map(waterfall.spans, &{&1.label, &1.depth, div(&1.began, 1_000_000)}) ==
               [{"total", 0, 0}, {"kernel e4a5", 1, 10}, {"tool.call double", 2, 20}, {"tool double", 3, 30}]

      [head, total | _] = lines = String.split(inspect(waterfall), "\n")
      assert head =~ "trace t · 4 spans · 100 ms"
      assert total =~ String.duplicate("━", 40) <> " 100 ms"
      assert List.last(lines) =~ ~r/^      tool double +━{16} + 40.0 ms  ✗ ValueError>/u
    end

    test "of spans that are each other's parents, or of none, ends", %{bridge: bridge} do
      span_of(bridge, [:bridge, :execution], "a", "b", 0, 1, %{kernel: "k"})
      span_of(bridge, [:bridge, :execution], "b", "a", 0, 1, %{kernel: "k"})
      span_of(bridge, [:bridge, :execution], "c", "c", 0, 1, %{kernel: "k"})
      assert {:ok, %{spans: [%{depth: 0}]}} = Telemetry.waterfall("t", bridge: bridge)
      assert {:error, %{name: :not_found}} = Telemetry.waterfall("x", bridge: bridge)
      assert {:error, %{name: :not_found}} = Telemetry.waterfall(nil, bridge: :never_started)
    end
  end

  test "an event of one's own has its name in the metadata", %{bridge: bridge} do
    :ok = tell_me("mine", [:bridge, :user])
    Telemetry.emit("rows read", %{rows: 3}, %{of: "file"}, bridge: bridge)
    assert_received {"mine", [:bridge, :user], %{rows: 3}, %{name: "rows read", of: "file"}}
  end
end
