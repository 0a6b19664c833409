defmodule Bridge.PrivacyTest do
  # Not async: the log is of the whole BEAM.
  use ExUnit.Case, async: false

  import ExUnit.CaptureLog

  alias Bridge.{Config, Secrets, Telemetry, TestKernels, Tools}

  # With what JSON, HTML and an inspect write otherwise.
  @token ~s(sk-planted/"1\n+end)
  @key "sk-planted-key-of-the-model"
  @given "private argument"
  @from_env "sk-planted-in-the-environment"
  # Parts that no way of writing them hides.
  @traces ["sk-planted", "key-of-the-model"]

  @leak """
  def leak(ctx, given, how):
      import sys, dspy
      token, key = ctx.secret("TOKEN"), dspy.settings.lm.kwargs["api_key"]
      for said in (token, key):
          print(said)
          print(said, file=sys.stderr)
          ctx.progress(1, 2, said)
          ctx.emit(said, {"n": 1}, key=said, **{said: 1})
          with ctx.span(said, key=said) as span:
              span["later"] = said
          try:
              ctx.get_variable(said)
          except Exception:
              pass
      try:
          ctx.call_tool("look", value=token)
      except Exception:
          pass
      if how == "raise":
          raise ValueError(token + key)
      if how == "hold":
          print("held", flush=True)
          ctx.call_tool("wait")
      return token if how == "return" else None
  """

  # Said without a secret: what is held then is the command itself.
  @hold """
  def hold(ctx, given):
      ctx.call_tool("wait")
  """

  defmodule Ear do
    @moduledoc false
    def log(event, %{config: %{test: test}}) do
      send(test, {:logged, inspect(event, limit: :infinity, printable_limit: :infinity)})
    end
  end

  setup do
    name = :"Bridge.Privacy#{System.unique_integer([:positive])}"
    directory = Path.join(System.tmp_dir!(), "privacy-#{System.unique_integer([:positive])}")
    File.mkdir_p!(directory)
    on_exit(fn -> File.rm_rf!(directory) end)
    level = Logger.level()
    Logger.configure(level: :debug)
    :ok = :logger.add_handler(__MODULE__, Ear, %{config: %{test: self()}, level: :all})

    on_exit(fn ->
      :logger.remove_handler(__MODULE__)
      Logger.configure(level: level)
      for {id, _name} <- Telemetry.Handlers.list([]), do: Telemetry.detach(id)
    end)

    {:ok, bridge: name, directory: directory}
  end

  defp bridge(context, opts \\ []) do
    test = self()

    opts =
      Keyword.merge(
        [
          name: context.bridge,
          kernels: 1,
          python: TestKernels.python(),
          store: Path.join(context.directory, "store"),
          env: %{"PLANTED" => @from_env},
          on_output: &send(test, {:output, &1})
        ],
        opts
      )

    sup = start_supervised!({Bridge, opts})
    :ok = Secrets.put("s", "TOKEN", @token, bridge: context.bridge)
    :ok = Bridge.lm("s", "openai/nobody", api_key: @key, api_base: "http://127.0.0.1:9", bridge: context.bridge)
    :ok = defined(Bridge.define("s", "leak", @leak, secrets: ["TOKEN"], lm: true, bridge: context.bridge))
    :ok = defined(Bridge.define("s", "hold", @hold, secrets: ["TOKEN"], lm: true, bridge: context.bridge))

    look = fn %{"value" => value} ->
      send(test, {:looked, value})
      raise "a tool's error that says #{value}"
    end

    wait = fn ->
      send(test, {:waiting, self()})
      receive do: (:go_on -> nil)
    end

    :ok = Tools.register("s", "look", look, bridge: context.bridge)
    :ok = Tools.register("s", "wait", wait, bridge: context.bridge)
    sup
  end

  defp defined(:ok), do: :ok
  defp defined({:ok, _}), do: :ok

  # Every process that the bridge has started, but for the tools' tasks: what runs there is the user's own.
  defp processes(sup, name) do
    for pid <- Process.list(),
        {:dictionary, dictionary} <- [Process.info(pid, :dictionary)],
        not Keyword.has_key?(dictionary, :"$callers"),
        ancestors = Keyword.get(dictionary, :"$ancestors", []),
        pid == sup or sup in ancestors or name in ancestors,
        do: pid
  end

  defp shown(term), do: inspect(term, limit: :infinity, printable_limit: :infinity)

  # Whatever writes it: Elixir, or Erlang's own handlers, which know no protocol.
  defp raw(term) do
    erlang = :io_lib.format("~tp", [term]) |> IO.chardata_to_string()
    inspect(term, limit: :infinity, printable_limit: :infinity, structs: false) <> erlang
  end

  defp state(pid), do: pid |> :sys.get_state(5_000)

  # The test's own supervisor has Bridge's options: those are its reports.
  defp logged do
    receive do
      {:logged, text} -> if text =~ "mfargs: {Bridge, :start_link, ", do: logged(), else: [text | logged()]
    after
      0 -> []
    end
  end

  defp outputs do
    receive do
      {:output, output} -> [output.text | outputs()]
    after
      0 -> []
    end
  end

  defp files(directory) do
    for path <- Path.wildcard(Path.join(directory, "**"), match_dot: true), File.regular?(path), do: File.read!(path)
  end

  defp leaks(texts, traces \\ @traces) do
    for text <- List.wrap(texts), trace <- traces, found = where(text, trace), do: found
  end

  defp where(text, trace) do
    case :binary.match(text, trace) do
      :nomatch -> nil
      {at, _} -> binary_part(text, max(at - 200, 0), min(260, byte_size(text) - max(at - 200, 0)))
    end
  end

  test "a secret is in no channel, wherever its command says it", context do
    test = self()

    :ok =
      Telemetry.attach(context.bridge, [:bridge], fn name, n, said, _ ->
        send(test, {:event, shown({name, n, said})})
      end)

    log =
      capture_log(fn ->
        sup = bridge(context)
        %{bridge: bridge} = context
        on = [bridge: bridge]
        {:ok, cfg} = Config.fetch(bridge)
        assert {:ok, nil} = Bridge.call("s", "leak", [@given, "end"], on)
        assert_received {:looked, @token}
        {:error, error} = Bridge.call("s", "leak", [@given, "raise"], on)
        assert {:ok, @token} = Bridge.call("s", "leak", [@given, "return"], [idempotency_key: "k"] ++ on)
        # It is remembered, and comes out as it went in.
        assert {:ok, @token} = Bridge.call("s", "leak", [@given, "return"], [idempotency_key: "k"] ++ on)
        held = Task.async(fn -> Bridge.call("s", "leak", [@given, "hold"], on) end)
        assert_receive {:waiting, tool}, 60_000

        [%{os_pid: os_pid}] = Bridge.kernels!(on)
        connection = File.read!(Path.wildcard(Path.join(cfg.runtime_dir, "*/*.json")) |> hd())
        {:ok, %{"key" => connection_key}} = Bridge.JSON.decode(connection)
        process = Enum.map(["cmdline", "environ"], &File.read!("/proc/#{os_pid}/#{&1}"))
        assert leaks(process, [@token, @key, "key-of-the-model", connection_key]) == []

        pids = processes(sup, bridge)
        assert length(pids) > 10
        said = for pid <- pids, do: [shown(:sys.get_status(pid, 5_000)), shown(state(pid))]
        assert leaks(List.flatten(said), @traces ++ [connection_key, @given]) == []

        tables = for table <- :ets.all(), :ets.info(table, :owner) in pids, do: raw(:ets.tab2list(table))
        assert leaks(tables) == []

        send(tool, :go_on)
        assert {:ok, nil} = Task.await(held, 60_000)

        path = Path.join(context.directory, "export.json")
        Bridge.export(path, on)
        {:ok, waterfall} = Telemetry.waterfall(nil, on)

        channels = [
          events: Enum.map(Telemetry.events(bridge), &shown/1),
          summary: [shown(Telemetry.summary(bridge)), raw(Telemetry.summary(bridge)), shown(waterfall)],
          errors: [Exception.message(error), shown(error)],
          export: [File.read!(path)],
          told: Enum.map([Bridge.journal!(on), Bridge.interrupted(on), Bridge.status!(on), cfg], &shown/1),
          "kernels' logs": cfg.runtime_dir |> Path.join("*/*.log") |> Path.wildcard() |> Enum.map(&File.read!/1)
        ]

        for {channel, texts} <- channels, do: assert({channel, leaks(texts)} == {channel, []})
        assert length(channels[:events]) > 50
        assert Enum.any?(channels[:events], &(&1 =~ "***"))
        :ok = Bridge.stop(bridge)
        assert leaks(files(context.directory)) == []
      end)

    assert leaks(log) == []
    assert leaks(logged()) == []
    heard = outputs()
    assert leaks(heard) == []
    assert Enum.any?(heard, &(&1 =~ "***"))
    events = for _ <- 1..100_000//1, {:event, text} <- [received()], do: text
    assert leaks(events) == []
  end

  defp received do
    receive do
      {:event, text} -> {:event, text}
    after
      0 -> nil
    end
  end

  test "what a command and its kernel hold shows no secret, not even to who knows no protocol", context do
    sup = bridge(context)
    held = Task.async(fn -> Bridge.call("s", "hold", [@given], bridge: context.bridge) end)
    assert_receive {:waiting, tool}, 60_000

    for pid <- processes(sup, context.bridge) do
      assert leaks([raw(state(pid)), raw(:sys.get_status(pid, 5_000))], [@token, "key-of-the-model"]) == []
      assert leaks([shown(state(pid)), shown(:sys.get_status(pid))], @traces ++ [@given]) == []
    end

    send(tool, :go_on)
    Task.await(held, 60_000)
  end

  test "a process that fails says in no report what it held or was told", context do
    log =
      capture_log(fn ->
        bridge(context)
        held = Task.async(fn -> Bridge.call("s", "hold", [@given], retries: 0, bridge: context.bridge) end)
        assert_receive {:waiting, _tool}, 60_000
        {:ok, cfg} = Config.fetch(context.bridge)
        [{_, command, _, _}] = DynamicSupervisor.which_children(Config.process(context.bridge, :commands))
        [kernel] = Bridge.Kernels.pids(cfg)

        # Each is told what no clause of it takes, with a request that carries everything before and behind it.
        request = {:request, self(), make_ref(), "function.call", nil}

        for pid <-
              [command, kernel] ++ Enum.map([:owner, :pool, :store], &Process.whereis(Config.process(cfg.name, &1))),
            Process.alive?(pid) do
          monitor = Process.monitor(pid)
          send(pid, {:"$gen_cast", {:no_such_thing, request}})
          assert_receive {:DOWN, ^monitor, :process, ^pid, _reason}, 60_000
        end

        assert {:error, error} = Task.await(held, 60_000)
        assert leaks(shown(error), @traces ++ [@given]) == []
      end)

    assert log =~ "terminating"
    reports = logged()
    assert length(reports) >= 5
    assert leaks([log | reports], @traces ++ [@given]) == []
  end

  test "a function that takes output and fails breaks no command, and shows nothing of it", context do
    log =
      capture_log(fn ->
        bridge(context, on_output: fn output -> raise ArgumentError, "cannot take #{byte_size(output.text)} bytes" end)
        Bridge.define("s", "shout", "def shout(ctx, x):\n    print(x)\n", secrets: ["TOKEN"], bridge: context.bridge)
        assert {:ok, nil} = Bridge.call("s", "shout", [@given], bridge: context.bridge)
      end)

    assert log =~ "cannot take"
    assert leaks([log | logged()], @traces ++ [@given]) == []
  end

  test "what is made is for its user alone, whatever the umask", context do
    store = Path.join(context.directory, "store")

    script = """
    {:ok, _} = Bridge.start_link(kernels: 1, python: #{inspect(TestKernels.python())}, store: #{inspect(store)})
    :ok = Bridge.Secrets.put("s", "TOKEN", "sk-planted")
    {:ok, 2.0} = Bridge.call("s", "math.sqrt", [4])
    Bridge.export(#{inspect(Path.join(context.directory, "export.json"))})
    {:ok, cfg} = Bridge.Config.fetch(Bridge)

    for path <- [cfg.runtime_dir, #{inspect(store)}, #{inspect(Path.join(context.directory, "export.json"))}] ++
          Path.wildcard(cfg.runtime_dir <> "/*") ++ Path.wildcard(cfg.runtime_dir <> "/*/*.json") ++
          Path.wildcard(#{inspect(store)} <> "/*", match_dot: true) do
      IO.puts("MODE \#{Integer.to_string(Bitwise.band(File.lstat!(path).mode, 0o777), 8)} \#{path}")
    end

    Bridge.stop()
    """

    paths = Enum.flat_map(:code.get_path(), &["-pa", to_string(&1)])
    command = ["-c", ~s(umask 000; exec "$@"), "sh", "elixir"] ++ paths ++ ["-e", script]
    {said, 0} = System.cmd("sh", command, stderr_to_stdout: true)
    modes = for [_, mode, path] <- Regex.scan(~r/^MODE (\d+) (.*)$/m, said), do: {Path.basename(path), mode}
    assert {"secrets.key", "600"} in modes
    assert {"k.json", "600"} in modes
    assert {"export.json", "600"} in modes
    assert {"store", "700"} in modes
    assert Enum.count(modes, fn {name, mode} -> String.starts_with?(name, "bridge-") and mode == "700" end) == 2
    assert for({name, mode} <- modes, mode not in ["600", "700"], do: {name, mode}) == []
  end
end
