defmodule Bridge.ToolsTest do
  use ExUnit.Case, async: true

  alias Bridge.{Error, Tools}

  defmodule Rules do
    def valid?(%{"answer" => answer}) when is_binary(answer), do: true
    def strict(%{"answer" => answer}) when is_binary(answer), do: true
    def strict(%{"fall" => _} = map), do: elsewhere(map)
    defp elsewhere(%{"never" => true}), do: :ok
    def sum(a, b, c), do: a + b + c
  end

  setup context do
    name = Module.concat(__MODULE__, "B#{context.line}")
    pid = start_supervised!({Tools, %{name: name}})
    {:ok, at: [bridge: name], owner: pid}
  end

  defp made(at, fun, opts) do
    assert :ok = Tools.register("s", "t", fun, opts ++ at)
    {:ok, tool} = Tools.fetch("s", "t", at)
    tool
  end

  # As the engine does it: checked, then run.
  defp call(tool, args, kwargs \\ %{}) do
    with {:ok, args} <- Tools.arguments(tool, args, kwargs), do: {:ok, Tools.invoke(tool, args)}
  end

  defp refused(result) do
    assert {:error, %Error{name: :invalid_arguments} = error} = result
    error.message
  end

  describe "how a function is given its arguments" do
    test "by args:, by place and by name", %{at: at} do
      tool = made(at, &Rules.sum/3, args: [:a, :b, :c])
      assert call(tool, [1, 2, 3]) == {:ok, 6}
      assert call(tool, [1], %{"c" => 3, "b" => 2}) == {:ok, 6}
      assert Tools.arguments(tool, [1], %{"c" => 3, "b" => 2}) == {:ok, [1, 2, 3]}
      assert refused(call(tool, [1, 2])) =~ "c: is missing"
      assert refused(call(tool, [1, 2, 3, 4])) =~ "takes 3 arguments by place, 4 were given"
      assert refused(call(tool, [1], %{"a" => 1, "b" => 2, "c" => 3})) =~ "was given a twice"
      assert refused(call(tool, [1, 2, 3], %{"d" => 4})) =~ "d: there is no such argument"
    end

    test "as one map, that patterns match", %{at: at} do
      tool = made(at, fn %{"x" => x} -> 2 * x end, schema: %{properties: %{x: %{type: :integer}}, required: [:x]})
      assert call(tool, [], %{"x" => 21}) == {:ok, 42}
      assert call(tool, [%{"x" => 21}]) == {:ok, 42}
      assert call(tool, [21]) == {:ok, 42}
      assert refused(call(tool, [], %{"x" => "much"})) == ~s(tool "t": x: "much" is not of type integer)
      assert refused(call(tool, [], %{})) =~ ~s(tool "t": arguments: )
    end

    test "as one map that is an argument itself, if the schema says so", %{at: at} do
      tool = made(at, fn %{"prediction" => %{"answer" => a}} -> a end, schema: %{properties: %{prediction: %{}}})
      assert call(tool, [%{"answer" => "x"}]) == {:ok, "x"}
      assert call(tool, [], %{"prediction" => %{"answer" => "x"}}) == {:ok, "x"}
    end

    test "as it is, if it is one value and nobody names it", %{at: at} do
      assert call(made(at, fn x -> x end, []), [[1, 2]]) == {:ok, [1, 2]}
      assert call(made(at, fn x -> x end, []), [], %{"a" => 1}) == {:ok, %{"a" => 1}}
      assert call(made(at, fn x -> x end, []), []) == {:ok, %{}}
    end

    test "by place only, where there are no names", %{at: at} do
      tool = made(at, fn a, b -> a - b end, [])
      assert call(tool, [5, 3]) == {:ok, 2}
      assert refused(call(tool, [5])) =~ "takes 2 arguments, 1 were given"
      assert refused(call(tool, [5, 3], %{"c" => 1})) =~ "by place only"
    end

    test "in the order of the schema's required; a default takes the place of what is missing", %{at: at} do
      schema = %{properties: %{a: %{}, b: %{}}, required: ["b", "a"]}
      assert call(made(at, fn b, a -> {b, a} end, schema: schema), [], %{"a" => 1, "b" => 2}) == {:ok, {2, 1}}
      schema = %{properties: %{a: %{}, b: %{default: 7}, c: %{}}, required: ["a"]}
      assert call(made(at, &{&1, &2, &3}, schema: schema, args: [:a, :b, :c]), [1]) == {:ok, {1, 7, nil}}
    end

    test "none, if it takes none; one map, if it names several and takes one", %{at: at} do
      tool = made(at, fn -> :now end, [])
      assert call(tool, []) == {:ok, :now}
      assert refused(call(tool, [1])) =~ "takes 0 arguments by place"
      tool = made(at, fn map -> map end, args: [:a, :b])
      assert call(tool, [1, 2]) == {:ok, %{"a" => 1, "b" => 2}}
      assert refused(call(tool, [1])) =~ "b: is missing"
    end

    test "a record as its fields", %{at: at} do
      tool = made(at, &Rules.valid?/1, [])
      record = %{__struct__: Bridge.Record, kind: :dataclass, class: "P", fields: %{"answer" => "x"}}
      assert call(tool, [record]) == {:ok, true}
    end
  end

  describe "functions and pattern matches are validators" do
    test "with a clause for what is wrong", %{at: at} do
      validate = fn
        %{"answer" => a} when is_binary(a) -> true
        _ -> false
      end

      tool = made(at, validate, [])
      assert call(tool, [], %{"answer" => "Paris"}) == {:ok, true}
      assert call(tool, [], %{"answer" => 3}) == {:ok, false}
    end

    test "without one, the error says which function it was, and no values", %{at: at} do
      extra = make_ref()

      for fun <- [&Rules.valid?/1, fn %{"answer" => a} when is_binary(a) -> {a, extra} end, &Rules.strict/1] do
        error = assert_raise Error, fn -> call(made(at, fun, []), [], %{"answer" => :secret}) end
        assert error.name == :tool_error
        assert error.type == "FunctionClauseError"
        assert error.message =~ ~s(tool "t": no clause of #{inspect(fun)} matches)
        assert error.message =~ ~s("answer" => …)
        refute error.message =~ "secret"
      end
    end

    test "in a cell too, where functions are evaluated and have no names", %{at: at} do
      {fun, _bindings} = Code.eval_string(~S|fn %{"answer" => a} when is_binary(a) -> true end|)
      assert_raise Error, ~r/no clause/, fn -> call(made(at, fun, []), [], %{"answer" => 1}) end
    end

    test "what fails further in is raised as it is", %{at: at} do
      assert_raise FunctionClauseError, fn -> call(made(at, &Rules.strict/1, []), [], %{"fall" => 1}) end
      inner = fn %{"x" => x} -> Rules.valid?(x) end
      assert_raise FunctionClauseError, fn -> call(made(at, inner, []), [], %{"x" => 1}) end
      assert_raise ArithmeticError, fn -> call(made(at, fn %{"x" => x} -> x + 1 end, []), [], %{"x" => "a"}) end
      assert catch_throw(call(made(at, fn _ -> throw(:x) end, []), [1])) == :x
    end
  end

  test "what cannot be a tool is refused with the reason", %{at: at} do
    for {name, fun, opts, said} <- [
          {"", & &1, [], "a tool's name"},
          {<<255>>, & &1, [], "a tool's name"},
          {:t, & &1, [], "a tool's name"},
          {"t", fn _, _, _, _, _, _, _, _, _ -> 1 end, [], "too wide"},
          {"t", &Rules.sum/3, [args: [:a, :b]], "names 2 arguments, its function takes 3"},
          {"t", &Rules.sum/3, [args: [:a, :a, :b]], "different names"},
          {"t", &Rules.sum/3, [args: :a], "a list of names"},
          {"t", &Rules.sum/3, [schema: %{properties: %{a: %{}}}], "nobody says in which order"},
          {"t", fn a -> a end, [args: [:a], schema: %{properties: %{b: %{}}}], "the schema has b"},
          {"t", & &1, [schema: %{type: "array"}], "arguments are of type"},
          {"t", & &1, [schema: %{properties: 3}], "its schema is wrong"},
          {"t", & &1, [schema: %{properties: %{x: %{type: "whatever"}}}], "its schema is wrong"},
          {"t", & &1, [schema: "x"], "is a map"},
          {"t", & &1, [timeout: 0], "milliseconds"},
          {"t", & &1, [description: 3], "is a text"},
          {"t", & &1, [idempotnet: true], "no options [:idempotnet]"}
        ] do
      assert {:error, %Error{name: :invalid_arguments, message: message}} = Tools.register("s", name, fun, opts ++ at)
      assert message =~ said
    end

    assert Tools.list!("s", at) == []
  end

  describe "the registry" do
    test "has the tools of each session by name, and what is passed as an argument", %{at: at} do
      for session <- ["a", "b"], name <- ["two", "one"], do: :ok = Tools.register(session, name, & &1, at)
      :ok = Tools.register("a", "one", fn -> 1 end, [description: "One.\nTruly.", idempotent: true, timeout: 5] ++ at)
      assert Enum.map(Tools.list!("a", at), & &1.name) == ["one", "two"]
      assert {:ok, %{idempotent: true, timeout: 5, description: "One.\nTruly."} = tool} = Tools.fetch("a", "one", at)
      assert inspect(tool) == "#Bridge.Tool<one (): One.>"
      assert %{__struct__: Bridge.Tool, name: "one", schema: %{"properties" => %{}}} = Tools.tool!("a", "one", at)
      assert :ok = Tools.unregister("a", "one", at)
      assert {:error, %Error{name: :not_found, remedy: remedy}} = Tools.fetch("a", "one", at)
      assert remedy =~ "Bridge.Tools.list"
      assert {:error, %Error{name: :not_found}} = Tools.unregister("a", "one", at)
      assert_raise Error, fn -> Tools.tool!("a", "one", at) end
      assert length(Tools.list!("b", at)) == 2
    end

    test "takes a session as well as its id", %{at: at} do
      session = %{__struct__: Bridge.Session, bridge: at[:bridge], id: "s"}
      :ok = Tools.register(session, "t", & &1)
      assert {:ok, %{name: "t"}} = Tools.fetch("s", "t", at)
    end

    test "forgets a session's tools with the session: none leaks", %{at: at} do
      for n <- 1..20, do: :ok = Tools.register("gone", "t#{n}", & &1, at)
      :ok = Tools.register("stays", "t", & &1, at)
      :ok = Tools.forget("gone", at)
      assert Tools.list!("gone", at) == []
      assert :ets.info(at[:bridge] |> Bridge.Config.process(:tools), :size) == 1
    end

    test "is bounded; a tool that is there may be replaced", %{at: at} do
      for n <- 1..1_000, do: :ok = Tools.register("s", "t#{n}", & &1, at)
      assert {:error, %Error{name: :quota_exceeded}} = Tools.register("s", "more", & &1, at)
      assert :ok = Tools.register("s", "t1", & &1, at)
      assert :ok = Tools.register("other", "t", & &1, at)
    end

    test "is read while its owner does nothing, and says when there is none", %{at: at, owner: owner} do
      :ok = Tools.register("s", "t", & &1, at)
      :sys.suspend(owner)
      assert {:ok, _tool} = Tools.fetch("s", "t", at)
      assert {:error, %Error{name: :host_closed}} = Tools.fetch("s", "t", bridge: :never_started)
      assert {:error, %Error{name: :host_closed}} = Tools.list("s", bridge: :never_started)
    end
  end

  test "the docs' examples hold" do
    {:ok, tool} = Tools.Registered.new("s", "minus", &Kernel.-/2, args: [:a, :b])
    assert {:ok, [5, 3]} = Tools.arguments(tool, [5], %{"b" => 3})
  end

  doctest Tools
end
