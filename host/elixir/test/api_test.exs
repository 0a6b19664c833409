defmodule Bridge.ApiTest do
  # What every function of `Bridge` has in common: how it is asked, and how it says that it was asked wrongly.
  use ExUnit.Case, async: true

  import Bridge.TestProcesses

  alias Bridge.{Error, SessionStore, Tools}

  test "an option that is misspelt is refused, and nothing is done" do
    %{name: bridge} = bridge(kernels: 0)
    at = [bridge: bridge]
    {:ok, 1} = SessionStore.set_variable("s", "x", 1, at)
    path = Path.join(System.tmp_dir!(), "api-#{System.pid()}.json")
    ref = %Bridge.Ref{id: "r", class: "c", session: "s", bridge: bridge}

    for {asked, option} <- [
          {&SessionStore.set_variable("s", "x", 2, &1), :if_versoin},
          {&SessionStore.update_variables("s", %{x: 2}, &1), :nope},
          {&SessionStore.delete_variable("s", "x", &1), :if_versions},
          {&SessionStore.get_variable("s", "x", &1), :brige},
          {&SessionStore.create_session("t", &1), :tttl},
          {&SessionStore.sessions/1, :brige},
          {&SessionStore.history("s", "x", &1), :version},
          {&Bridge.export(path, &1), :session},
          {&Bridge.import(path, &1), :sessions},
          {&Bridge.kernels/1, :brige},
          {&Bridge.status/1, :brige},
          {&Bridge.stats/1, :brige},
          {&Bridge.journal/1, :sesion},
          {&Bridge.quarantine/1, :brige},
          {&Bridge.interrupted/1, :brige},
          {&Bridge.call("s", "math.sqrt", [4], &1), :name},
          {&Bridge.call_method(ref, "m", [], &1), :name},
          {&Bridge.create_instance("c", [], &1), :nam},
          {&Bridge.inspect_object("math", &1), :kwargs},
          {&Bridge.define("s", "f", "def f(): pass", &1), :lmm},
          {&Bridge.Secrets.put("s", "KEY", "value", &1), :brige},
          {&Tools.register("s", "t", fn -> 1 end, &1), :idempotnt}
        ] do
      assert {:error, %Error{message: message}} = asked.(at ++ [{option, 1}])
      assert message =~ inspect(option)
    end

    assert_raise Error, ~r/no option :idempotency_key/, fn ->
      "s" |> Bridge.stream("f", [], at ++ [idempotency_key: "k"]) |> Enum.to_list()
    end

    assert_raise Error, ~r/no option :brige/, fn -> Bridge.session("s", brige: bridge) end
    assert {:ok, %{"x" => 1}} = {:ok, %{"x" => SessionStore.get_variable!("s", "x", at)}}
    assert {:ok, ["s"]} = SessionStore.sessions(at)
    refute File.exists?(path)
  end

  test "options that are none are refused in words; a bridge that was named without its key is told how" do
    assert {:error, %Error{name: :invalid_params, remedy: "Say which bridge: bridge: Some.Bridge."}} =
             Bridge.kernels(Some.Bridge)

    assert {:error, %Error{name: :invalid_params}} = Bridge.call("s", "f", [], %{deadline: 3})
  end

  test "a bridge that does not run is an error for whoever asks it anything, and is said how to start" do
    at = [bridge: Not.There]

    for ask <- [
          &Bridge.kernels/1,
          &Bridge.status/1,
          &Bridge.stats/1,
          &Bridge.journal/1,
          &Bridge.quarantine/1,
          &Bridge.interrupted/1,
          &Bridge.contract/1,
          &Tools.list("s", &1),
          &Bridge.call("s", "f", [], &1),
          &SessionStore.sessions/1
        ] do
      assert {:error, %Error{name: :host_closed}} = ask.(at)
    end

    assert {:error, %Error{remedy: "Start it: Bridge.start_link(name: Not.There)."}} = Bridge.kernels(at)

    for ask <- [&Bridge.kernels!/1, &Bridge.journal!/1, &Tools.list!("s", &1)],
        do: assert_raise(Error, fn -> ask.(at) end)
  end

  test "a session of one bridge is not asked for at another" do
    %{name: one} = bridge(kernels: 0)
    %{name: other} = bridge(kernels: 0)
    session = Bridge.session("s", bridge: one)
    assert {:ok, 1} = SessionStore.set_variable(session, "x", 1, bridge: one)

    for ask <- [
          &SessionStore.get_variable(session, "x", &1),
          &Bridge.call(session, "f", [], &1),
          &Tools.list(session, &1),
          &Bridge.Secrets.list(session, &1)
        ] do
      assert {:error, %Error{name: :invalid_params, message: message}} = ask.(bridge: other)
      assert message =~ inspect(one) and message =~ inspect(other)
    end
  end

  test "arguments that are none are refused in words that show no value" do
    %{name: bridge} = bridge(kernels: 0)

    for {args, opts} <- [
          {7, []},
          {~D[2024-01-01], []},
          {[1], [kwargs: ["planted"]]},
          {[1], [kwargs: 1]},
          {[1], [kwargs: %{1 => "planted"}]},
          {{[1], ["planted"]}, []},
          {{1, 2}, []},
          {[x: 1, x: 2], []},
          {[x: "planted"], [kwargs: [x: 1]]}
        ] do
      assert {:error, %Error{name: :invalid_params, message: message}} =
               Bridge.call("s", "f", args, [bridge: bridge] ++ opts)

      refute message =~ "planted"
    end
  end

  test "a function that its source does not define, or that has no name, is refused where it is given" do
    %{name: bridge} = bridge(kernels: 0)

    for {name, source} <- [
          {"f", "def g(): pass"},
          {"not a name", "def not a name(): pass"},
          {"f", ""},
          {"", "def (): 1"}
        ] do
      assert {:error, %Error{name: :invalid_params}} = Bridge.define("s", name, source, bridge: bridge)
    end

    for source <- ["def f(): pass", "import os\n\nasync  def f (ctx): pass", "@cached\ndef f[T](x: T): return x"] do
      assert :ok = Bridge.define("s", "f", source, bridge: bridge)
    end

    assert :ok = Bridge.define("s", "größe", "def größe(): return 1", bridge: bridge)
  end

  test "if_version is a version" do
    %{name: bridge} = bridge(kernels: 0)

    for wrong <- ["a", -1, 1.0] do
      assert {:error, %Error{name: :invalid_params}} =
               SessionStore.set_variable("s", "x", 1, if_version: wrong, bridge: bridge)

      opts = [if_versions: %{x: wrong}, bridge: bridge]
      assert {:error, %Error{name: :invalid_params}} = SessionStore.update_variables("s", %{x: 1}, opts)
    end
  end

  test "an option of the bridge that is given twice, or is not known, is named" do
    assert_raise ArgumentError, ~r/kernels: is given twice/, fn -> Bridge.start_link(kernels: 1, kernels: 2) end
    assert_raise ArgumentError, ~r/no option :kernel/, fn -> Bridge.start_link(kernel: 1) end
  end

  test "what a supervisor shows of how its bridge is started has nothing of the environment" do
    for env <- [%{"KEY" => "planted"}, [KEY: "planted"], fn -> %{"KEY" => "planted"} end] do
      %{start: start} = Bridge.child_spec(name: Some.Bridge, env: env)
      refute inspect(start, structs: false) =~ "planted"
      refute :io_lib.format("~p", [start]) |> to_string() =~ "planted"
      {Bridge, :start_link, [opts]} = start
      assert Bridge.Config.new!(opts).env.() == %{"KEY" => "planted"}
    end
  end

  # In a BEAM of its own: here there is one.
  test "without a JSON library that is said, by doctor and by start_link; one that comes later is found" do
    code = """
    true = :code.del_path(:jiffy) || true
    if :code.is_loaded(:jiffy), do: (:code.purge(:jiffy); :code.delete(:jiffy))
    for path <- :code.get_path(), to_string(path) =~ "jiffy", do: :code.del_path(path)
    {:error, %{name: :kernel_start_failed, remedy: remedy}} = Bridge.start_link(kernels: 0)
    true = remedy =~ "jason"
    false = Bridge.doctor(python: "/nowhere").ready
    %{status: :missing, remedy: ^remedy} = Enum.find(Bridge.doctor(python: "/nowhere").checks, &(&1.name == "JSON"))

    defmodule Jason do
      def decode(text, _opts), do: {:ok, %{"text" => text}}
    end

    {:ok, Jason} = Bridge.JSON.backend()
    {:ok, %{"text" => "[1]"}} = Bridge.JSON.decode("[1]")
    IO.puts("as it should be")
    """

    if elem(Bridge.JSON.backend(), 1) == :jiffy do
      ebin = Bridge |> :code.which() |> Path.dirname()
      {out, 0} = System.cmd("elixir", ["-pa", ebin, "-e", code], stderr_to_stdout: true)
      assert out =~ "as it should be"
    end
  end
end
