defmodule Bridge.LiveTest do
  # Not async: what stands for Kino is there for the whole BEAM while these run.
  use ExUnit.Case, async: false

  alias Bridge.{Display, Live, Telemetry}

  setup_all do
    loaded = Code.require_file("../support/kino.exs", __DIR__)

    on_exit(fn ->
      for {module, _code} <- loaded do
        :code.delete(module)
        :code.purge(module)
      end

      :code.delete(Module.concat(Kino.Render, Display))
      :code.purge(Module.concat(Kino.Render, Display))
      Code.unrequire_files([Path.expand("../support/kino.exs", __DIR__)])
    end)
  end

  setup context do
    # Stands for Livebook: the group leader of the cell, which is told what is shown.
    test = self()
    leader = spawn_link(fn -> livebook(test, "demo.livemd#cell:1") end)
    own = Process.group_leader()
    name = Module.concat(__MODULE__, "B#{context.line}")
    start_supervised!({Telemetry, %{name: name}})
    Process.group_leader(self(), leader)
    on_exit(fn -> Process.group_leader(self(), own) end)
    {:ok, bridge: name, leader: leader}
  end

  defp livebook(test, file) do
    receive do
      {:io_request, from, ref, :livebook_get_evaluation_file} ->
        send(from, {:io_reply, ref, file || {:error, :request}})
        livebook(test, file)

      {:io_request, from, ref, _printed} ->
        send(from, {:io_reply, ref, :ok})
        livebook(test, file)

      {:cell, file} ->
        livebook(test, file)

      message ->
        send(test, message)
        livebook(test, file)
    end
  end

  defp said(span, more) do
    Map.merge(
      %{
        command: "function.call",
        subject: "f_#{span}",
        session: "s",
        command_id: "id-#{span}",
        trace_id: "t",
        span_id: span,
        parent_span_id: nil
      },
      more
    )
  end

  defp start(bridge, span, more \\ %{}) do
    Telemetry.execute(bridge, [:bridge, :command, :start], %{system_time: 1}, said(span, more))
  end

  defp stop(bridge, span, more \\ %{}) do
    Telemetry.execute(bridge, [:bridge, :command, :stop], %{duration: 1, attempts: 1}, said(span, more))
  end

  defp fail(bridge, span) do
    failed = said(span, %{error: "ValueError"})
    Telemetry.execute(bridge, [:bridge, :command, :exception], %{duration: 1, attempts: 1}, failed)
  end

  # What is shown in the end: more may come, so what is waited for is a text.
  defp shown(text, frame \\ nil) do
    assert_receive {:kino, :shown, found, %{html: html}} when frame == nil or found == frame, 60_000
    there? = if is_function(text), do: text.(html), else: html =~ text
    if there?, do: {found, html}, else: shown(text, frame)
  end

  defp kernel_tells(bridge, root, events) do
    shared = %{
      "command" => "function.call",
      "subject" => "f",
      "session" => "s",
      "kernel" => "k",
      "attempt" => 1,
      "trace_id" => "t",
      "span_id" => "x",
      "parent_span_id" => root
    }

    events = for {name, numbers, more} <- events, do: %{"name" => name, "measurements" => numbers, "metadata" => more}
    Telemetry.ingest(bridge, [%{"metadata" => shared, "events" => events}], "k")
  end

  test "a command has one line beneath its cell, which is settled when it has ended", %{bridge: bridge} do
    start(bridge, "a")
    {frame, _html} = shown("<b>f_a</b>")
    assert_received {:kino, :rendered, ^frame}
    routed = %{queue: System.convert_time_unit(20, :millisecond, :native), candidates: 1, expected: 0}

    Telemetry.execute(bridge, [:bridge, :pool, :route], routed, %{
      kernel: "e4a50d",
      subject: "f",
      session: "s",
      span_id: "a"
    })

    kernel_tells(bridge, "a", [
      {["bridge", "execution", "progress"], %{"done" => 3, "total" => 10}, %{"message" => "demos"}}
    ])

    {^frame, html} = shown("3/10 demos", frame)
    assert html =~ ~s(<progress value="0.300")
    assert html =~ "kernel e4a5 · queued 20.0 ms"
    stop(bridge, "a")
    {^frame, html} = shown("✓", frame)
    refute html =~ "demos"
  end

  test "what its kernel tells late is in the line too: tokens, callbacks", %{bridge: bridge} do
    start(bridge, "a")
    stop(bridge, "a")
    {frame, _html} = shown("✓")

    lm =
      {["bridge", "dspy", "lm", "stop"], %{"duration" => 5, "tokens" => 1200},
       %{"model" => "m", "parent_span_id" => "y"}}

    ended =
      {["bridge", "execution", "stop"], %{"duration" => 5, "callbacks" => 2}, %{"success" => true, "error" => nil}}

    kernel_tells(bridge, "a", [lm, lm, ended])
    {^frame, html} = shown("2 LM calls, 2,400 tokens", frame)
    assert html =~ "2 callbacks"
  end

  test "beyond a cell's first five, one line sums up all, and failures have lines of their own", %{bridge: bridge} do
    for n <- 1..300,
        do:
          (
            start(bridge, "ok#{n}")
            stop(bridge, "ok#{n}")
          )

    for n <- 1..9,
        do:
          (
            start(bridge, "bad#{n}")
            fail(bridge, "bad#{n}")
          )

    {_frame, html} = shown("309 commands")
    html = if html =~ "9 ✗", do: html, else: elem(shown("9 ✗"), 1)
    assert length(String.split(html, "bridge-line")) - 1 == 5 + 5 + 1
    assert html =~ "f_ok5<" and html =~ "f_bad5<"
    refute html =~ "f_ok6<" or html =~ "f_bad6<"
    assert html =~ "300 ✓"
  end

  test "what a tool sends is part of the command that called it", %{bridge: bridge} do
    start(bridge, "outer")

    tool = %{
      tool: "t",
      session: "s",
      command_id: "id-outer",
      trace_id: "t",
      span_id: "tool",
      parent_span_id: "callback"
    }

    Telemetry.execute(bridge, [:bridge, :tool, :start], %{system_time: 1}, tool)
    span = %{name: "part", trace_id: "t", span_id: "span", parent_span_id: "tool"}
    Telemetry.execute(bridge, [:bridge, :span, :start], %{system_time: 1}, span)
    start(bridge, "inner", %{parent_span_id: "span"})
    lm = {["bridge", "dspy", "lm", "stop"], %{"duration" => 5, "tokens" => 7}, %{"model" => "m"}}
    kernel_tells(bridge, "inner", [lm])
    stop(bridge, "inner")
    stop(bridge, "outer")
    {_frame, html} = shown("✓")
    html = if html =~ "7 tokens", do: html, else: elem(shown("7 tokens"), 1)
    refute html =~ "f_inner"
  end

  test "another cell has a frame of its own, and a cell that is run anew a new one", %{bridge: bridge, leader: leader} do
    start(bridge, "a")
    stop(bridge, "a")
    {first, _html} = shown("f_a")
    send(leader, {:cell, "demo.livemd#cell:2"})
    start(bridge, "b")
    stop(bridge, "b")
    {second, html} = shown("f_b")
    assert second != first
    refute html =~ "f_a"

    monitor = Process.monitor(second.pid)
    send(second.pid, :cell_runs_anew)
    assert_receive {:DOWN, ^monitor, :process, _, _}
    # The process of the lines has heard of it before it hears of what comes now: both come in the order they were sent.
    {live, _pending} = :persistent_term.get({Telemetry, bridge}).live
    :sys.get_state(live)
    start(bridge, "c")
    stop(bridge, "c")
    {third, html} = shown("f_c")
    assert third not in [first, second]
    refute html =~ "f_b"
  end

  test "of a frame that fails the commands know nothing: nothing is shown any more", %{bridge: bridge} do
    {live, _pending} = :persistent_term.get({Telemetry, bridge}).live
    monitor = Process.monitor(live)
    Process.exit(live, :kill)
    assert_receive {:DOWN, ^monitor, :process, _, :killed}
    assert :ok = start(bridge, "a")
    # The owner hears of the end in its own time: after a call it has.
    :ok = Telemetry.enable([:none], bridge: bridge)
    assert :persistent_term.get({Telemetry, bridge}).live == nil
    assert :ok = stop(bridge, "a")
    assert [%{count: 1}] = Telemetry.latencies(bridge)
    :ok = Telemetry.live(true, bridge: bridge)
    start(bridge, "b")
    stop(bridge, "b")
    assert {_frame, _html} = shown("f_b")
  end

  test "switched off, nothing is shown", %{bridge: bridge} do
    :ok = Telemetry.live(false, bridge: bridge)
    start(bridge, "a")
    stop(bridge, "a")
    assert :persistent_term.get({Telemetry, bridge}).live == nil
    refute_received {:kino, _, _}
  end

  test "no command waits for lines that nobody renders, and what waits for them is bounded", %{bridge: bridge} do
    {live, pending} = :persistent_term.get({Telemetry, bridge}).live
    :sys.suspend(live)
    start(bridge, "first")

    for n <- 1..12_000 do
      start(bridge, "x#{n}")
      stop(bridge, "x#{n}")
    end

    {:message_queue_len, waiting} = Process.info(live, :message_queue_len)
    assert waiting <= 20_001
    :sys.resume(live)
    # Two have begun of which the end was not heard: they are not said to run for ever.
    {_frame, html} = shown(&(&1 =~ "<b>9,999 commands</b>" and not (&1 =~ "running")))
    assert html =~ "9,999 ✓"
    assert :atomics.get(pending, 1) == 0
  end

  test "the dashboard is a frame that is changed when something has changed", %{bridge: bridge} do
    frame = Live.dashboard(bridge)
    assert_receive {:kino, :shown, ^frame, %{html: before}}
    assert before =~ "0 kernels"
    assert_receive {:kino, :listen, 500, refresh}
    refresh.(1)
    kernel = %{kernel: "k1", pid: 1, spare: false, deaths: 0}
    Telemetry.execute(bridge, [:bridge, :kernel, :start], %{duration: 1, system_time: 1}, kernel)
    refresh.(2)
    # The frame has one mailbox: had the first refresh shown anything, it would have come before this.
    assert_receive {:kino, :shown, ^frame, %{html: later}}
    assert later =~ "1 kernel</b>"
  end

  test "without Kino there is a summary", %{bridge: bridge} do
    assert %Telemetry.Summary{} = Telemetry.summary(bridge)
  end

  describe "what a kernel displays" do
    test "is shown beneath the cell, as the richest that there is" do
      png = Base.encode64(<<0x89, "PNG">>)

      for {data, expected} <- [
            {%{"text/html" => "<table></table>", "text/plain" => "x"},
             %{__struct__: Kino.HTML, html: "<table></table>"}},
            {%{"image/png" => png <> "\n", "text/plain" => "x"},
             %{__struct__: Kino.Image, bytes: <<0x89, "PNG">>, mime: "image/png"}},
            {%{"image/svg+xml" => ["<svg>", "</svg>"]},
             %{__struct__: Kino.Image, bytes: "<svg></svg>", mime: "image/svg+xml"}},
            {%{"text/markdown" => "*a*", "text/plain" => "a"}, %{__struct__: Kino.Markdown, text: "*a*"}},
            {%{"text/latex" => "$x$"}, %{__struct__: Kino.Markdown, text: "$$x$$"}},
            {%{"text/plain" => "just text"}, %{__struct__: Kino.Text, text: "just text"}},
            {%{"image/png" => "no base64!", "text/plain" => "a plot"}, %{__struct__: Kino.Text, text: "a plot"}},
            {%{"text/html" => 3, "text/plain" => "odd"}, %{__struct__: Kino.Text, text: "odd"}}
          ] do
        assert :ok = Live.display(Display.new(%{"data" => data}))
        assert_receive {:kino, :rendered, ^expected}
      end
    end

    test "is shown in its own place when it is updated" do
      content = &%{"data" => %{"text/plain" => &1}, "transient" => %{"display_id" => &2}}
      assert :ok = Live.display(Display.new(content.("10 %", "bar")))
      assert_receive {:kino, :rendered, %{__struct__: Kino.Frame} = frame}
      assert_receive {:kino, :shown, ^frame, %{text: "10 %"}}
      assert :ok = Live.display(Display.new(content.("99 %", "bar"), update: true))
      assert_receive {:kino, :shown, ^frame, %{text: "99 %"}}
      assert :ok = Live.display(Display.new(content.("of another process", "other"), update: true))
      assert_receive {:kino, :rendered, %{text: "of another process"}}
    end

    test "breaks nobody when it cannot be shown" do
      gone = spawn(fn -> :ok end)
      odd = %Display{data: %{"text/html" => "<p>"}, display_id: :odd, update: false}
      log = ExUnit.CaptureLog.capture_log(fn -> assert :ok = Live.display(odd, :no_process) end)
      assert log =~ "a display could not be shown"
      assert :ok = Live.display(%{odd | display_id: nil}, gone)
    end

    test "shows itself where its value is a cell's result" do
      display = Display.new(%{"data" => %{"text/markdown" => "*a*"}})
      assert {:livebook, %{__struct__: Kino.Markdown, text: "*a*"}} = apply(Kino.Render, :to_livebook, [display])
    end
  end
end
