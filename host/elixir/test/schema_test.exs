defmodule Bridge.SchemaTest do
  use ExUnit.Case, async: true

  alias Bridge.{Bytes, Record, Ref, Schema, TestKernels}

  doctest Bridge.Schema

  defp fits?(schema, value) do
    assert Schema.check(schema) == :ok
    Schema.validate(schema, value) == :ok
  end

  defp problem(schema, value) do
    assert Schema.check(schema) == :ok
    assert {:error, [{path, message} | _]} = Schema.validate(schema, value)
    path <> ": " <> message
  end

  defp wrong(schema) do
    assert {:error, message} = Schema.check(schema)
    message
  end

  # {schema, values that fit, values that do not}
  @cases [
    {%{}, [nil, 1, "a", [], %{}], []},
    {true, [1], []},
    {false, [], [1, nil]},
    {%{"type" => "null"}, [nil], [false, 0, ""]},
    {%{"type" => "boolean"}, [true, false], [0, 1, nil]},
    {%{"type" => "integer"}, [0, -5, 36_893_488_147_419_103_232], [1.0, 1.5, true, "1"]},
    {%{"type" => "number"}, [0, 1.5], [true, "1", nil]},
    {%{"type" => "string"}, ["", "é"], [1, nil]},
    {%{"type" => "array"}, [[], [1]], [%{}, "a"]},
    {%{"type" => "object"}, [%{}, %{"a" => 1}], [[], "a"]},
    {%{"type" => ["integer", "null"]}, [1, nil], ["a", 1.5]},
    {%{"enum" => [1, "a", nil, [1], %{"a" => 1}]}, [1, 1.0, "a", nil, [1.0], %{"a" => 1}], [2, true, "b", [1, 2]]},
    {%{"const" => %{"a" => [1]}}, [%{"a" => [1]}], [%{"a" => [2]}, nil]},
    {%{"const" => 0}, [0, 0.0], [false]},
    {%{"minimum" => 1, "maximum" => 2.5}, [1, 2.5, "a"], [0, 2.6]},
    {%{"exclusiveMinimum" => 1, "exclusiveMaximum" => 2}, [1.5], [1, 2]},
    {%{"multipleOf" => 0.1}, [0.3, 1, 0], [0.25]},
    {%{"multipleOf" => 3}, [9, -3, 6.0], [10, 4.5]},
    {%{"minLength" => 2, "maxLength" => 3}, ["éé", "😀😀😀", 1], ["é", "abcd"]},
    {%{"pattern" => "^a+$"}, ["a", "aa", 1], ["a\n", "ba", ""]},
    {%{"pattern" => "b"}, ["abc"], ["ac"]},
    {%{"pattern" => "^[^\\d]$"}, ["é"], ["1"]},
    {%{"items" => %{"type" => "integer"}}, [[], [1, 2], "a"], [[1, "a"], [1.0]]},
    {%{"items" => false}, [[]], [[1]]},
    {%{"prefixItems" => [%{"type" => "integer"}, %{"type" => "string"}]}, [[1, "a", nil], [1], []], [["a"], [1, 2]]},
    {%{"prefixItems" => [%{"type" => "integer"}], "items" => %{"type" => "string"}}, [[1, "a"]], [[1, 2], ["a"]]},
    {%{"prefixItems" => [true], "items" => false}, [[1]], [[1, 2]]},
    {%{"minItems" => 1, "maxItems" => 2}, [[1], [1, 2]], [[], [1, 2, 3]]},
    {%{"uniqueItems" => true}, [[1, 2], [1, true], [0, false, [0], [false]]],
     [[1, 1], [1, 1.0], [%{"a" => 1}, %{"a" => 1.0}]]},
    {%{"uniqueItems" => false}, [[1, 1]], []},
    {%{"contains" => %{"type" => "integer"}}, [["a", 1]], [["a"], []]},
    {%{"contains" => %{"type" => "integer"}, "minContains" => 2, "maxContains" => 3}, [[1, 2]], [[1], [1, 2, 3, 4]]},
    {%{"contains" => true, "minContains" => 0}, [[]], []},
    {%{"properties" => %{"a" => %{"type" => "integer"}}}, [%{"a" => 1}, %{"b" => "x"}, 1], [%{"a" => "x"}]},
    {%{"properties" => %{"a" => true}, "additionalProperties" => false}, [%{"a" => 1}, %{}], [%{"b" => 1}]},
    {%{"additionalProperties" => %{"type" => "integer"}}, [%{"a" => 1}], [%{"a" => "x"}]},
    {%{"patternProperties" => %{"^x-" => %{"type" => "integer"}}, "additionalProperties" => false}, [%{"x-a" => 1}],
     [%{"x-a" => "1"}, %{"y" => 1}]},
    {%{"propertyNames" => %{"maxLength" => 1}}, [%{"a" => 1}], [%{"ab" => 1}]},
    {%{"required" => ["a", "b"]}, [%{"a" => nil, "b" => 1}, []], [%{"a" => 1}]},
    {%{"minProperties" => 1, "maxProperties" => 1}, [%{"a" => 1}], [%{}, %{"a" => 1, "b" => 2}]},
    {%{"dependentRequired" => %{"a" => ["b"]}}, [%{}, %{"b" => 1}, %{"a" => 1, "b" => 1}], [%{"a" => 1}]},
    {%{"dependentSchemas" => %{"a" => %{"required" => ["b"]}}}, [%{}, %{"a" => 1, "b" => 1}], [%{"a" => 1}]},
    {%{"anyOf" => [%{"type" => "integer"}, %{"minLength" => 2}]}, [1, "ab", nil], ["a"]},
    {%{"oneOf" => [%{"type" => "integer"}, %{"minimum" => 2}]}, [1, 2.5], [3, 1.5]},
    {%{"allOf" => [%{"minimum" => 1}, %{"maximum" => 2}]}, [1, 2], [0, 3]},
    {%{"not" => %{"type" => "string"}}, [1], ["a"]},
    {%{"if" => %{"type" => "integer"}, "then" => %{"minimum" => 1}, "else" => %{"type" => "string"}}, [1, "a"],
     [0, nil]},
    {%{"if" => %{"type" => "integer"}}, [1, "a"], []},
    {%{"$ref" => "#/$defs/n", "$defs" => %{"n" => %{"type" => "integer"}}}, [1], ["a"]},
    {%{"$ref" => "#/$defs/a~1b%25", "$defs" => %{"a/b%" => %{"type" => "integer"}}}, [1], ["a"]},
    {%{"$ref" => "#n", "$defs" => %{"x" => %{"$anchor" => "n", "type" => "integer"}}}, [1], ["a"]},
    {%{"$ref" => "#/$defs/n", "minimum" => 2, "$defs" => %{"n" => %{"type" => "integer"}}}, [2], [1, 2.5]},
    {%{"properties" => %{"next" => %{"$ref" => "#"}}, "additionalProperties" => false},
     [%{}, %{"next" => %{"next" => %{}}}], [%{"next" => %{"next" => %{"x" => 1}}}]},
    {%{"format" => "date", "title" => "T", "default" => 1, "x-mine" => [1]}, ["no date"], []}
  ]

  test "each keyword takes what fits, and nothing else" do
    for {schema, fitting, others} <- @cases do
      for value <- fitting, do: assert({schema, value, fits?(schema, value)} == {schema, value, true})
      for value <- others, do: assert({schema, value, fits?(schema, value)} == {schema, value, false})
    end
  end

  test "the Python host judges the same schemas and values alike" do
    # `format` is judged there, and only remarked here.
    rows =
      for {%{} = schema, fitting, others} <- @cases, not is_map_key(schema, "format") do
        %{
          "schema" => schema,
          "values" => fitting ++ others,
          "fits" => Enum.map(fitting, fn _ -> true end) ++ Enum.map(others, fn _ -> false end)
        }
      end

    script = """
    import json, sys
    sys.path.insert(0, sys.argv[1])
    from bridge_host.store.schemas import JsonSchema
    for row in json.loads(sys.argv[2]):
        found = [JsonSchema(row["schema"]).problem(value, 10) is None for value in row["values"]]
        if found != row["fits"]:
            print(row["schema"], found, row["fits"])
    """

    python_host = Path.expand("../../python", __DIR__)
    text = rows |> Bridge.JSON.encode!() |> IO.iodata_to_binary()
    assert System.cmd(TestKernels.python(), ["-c", script, python_host, text], stderr_to_stdout: true) == {"", 0}
  end

  test "a problem has its path, and says what is wrong without repeating a long value" do
    schema = %{
      "properties" => %{
        "rows" => %{"items" => %{"required" => ["id"], "properties" => %{"n" => %{"type" => "integer"}}}}
      }
    }

    assert problem(schema, %{rows: [%{id: 1}, %{id: 1, n: "x"}]}) == ~s(["rows"][1]["n"]: "x" is not of type integer)
    assert problem(schema, %{"rows" => [%{}]}) == ~s(["rows"][0]: "id" is a required property)
    long = String.duplicate("x", 10_000)
    assert problem(%{"type" => "integer"}, long) == ": a string of 10000 characters is not of type integer"
    assert problem(%{"type" => "string"}, List.duplicate(1, 100)) == ": a list of 100 items is not of type string"
    assert problem(%{"enum" => [long]}, 1) |> String.length() < 200

    assert problem(%{"additionalProperties" => false}, %{"b" => 1, "a" => 2}) ==
             ~s(: additional properties are not allowed: "a", "b")

    assert problem(%{"anyOf" => [%{"type" => "null"}]}, 1) == ": 1 fits none of the alternatives"
    assert problem(%{"type" => ["null", "string"]}, 1) == ": 1 is not of type null or string"
  end

  test "at most 16 problems are told, and a long list is not looked at further" do
    assert {:error, problems} =
             Schema.validate(%{"items" => %{"type" => "integer", "minimum" => 1}}, List.duplicate("a", 1_000_000))

    assert length(problems) == 16
  end

  test "a value is judged as the JSON that stands for it" do
    assert fits?(%{"type" => "array", "items" => %{"type" => "integer"}}, {1, 2})
    assert fits?(%{"type" => "array"}, MapSet.new([1]))
    assert fits?(%{"type" => "string"}, ~D[2024-01-01])
    assert fits?(%{"type" => "string", "pattern" => "^2024-01-02T03:04:05Z$"}, ~U[2024-01-02 03:04:05Z])
    assert fits?(%{"const" => "AP8="}, Bytes.new(<<0, 255>>))
    assert fits?(%{"required" => ["a"], "type" => "object"}, Record.new("x.Y", %{"a" => 1}))
    assert fits?(%{"properties" => %{"a" => %{"type" => "integer"}}}, %{a: 1})
    assert fits?(%{"const" => 1.5}, %Bridge.NpScalar{dtype: "<f4", data: <<1.5::float-32-little>>})
    refute fits?(%{"type" => "number"}, :nan)
    refute fits?(%{}, %Ref{id: "r"})

    assert problem(%{}, %{"a" => [%Ref{id: "r"}]}) ==
             ~s(["a"][0]: this value is or holds a Bridge.Ref, which has no JSON form)

    assert problem(%{}, {{:f, 32}, {1}, "abcd"}) == ": this value has no JSON form"
    assert problem(%{}, %{"a" => self()}) == ~s(["a"]: this value has no JSON form)
    assert problem(%{}, [1 | 2]) == ": this value has no JSON form"
    assert problem(%{}, Enum.reduce(1..200, 0, fn _, inner -> [inner] end)) =~ "is nested too deeply"
  end

  test "what is no schema is refused when it is taken, and says where" do
    assert wrong("a") == "a schema is an object, true or false"
    assert wrong(%{type: "string"}) =~ "strings for keys"
    assert wrong(%{"properties" => %{"a" => %{"type" => "int"}}}) =~ ~s(["properties"]["a"]: "type" must be one of)
    assert wrong(%{"type" => []}) =~ ~s("type")
    assert wrong(%{"required" => "a"}) =~ ~s("required" must be a list of distinct strings)
    assert wrong(%{"required" => ["a", "a"]}) =~ "distinct"
    assert wrong(%{"minimum" => "1"}) =~ ~s("minimum" must be a number)
    assert wrong(%{"minLength" => -1}) =~ ~s("minLength" must be an integer from 0)
    assert wrong(%{"multipleOf" => 0}) =~ ~s("multipleOf" must be a number above 0)
    assert wrong(%{"enum" => 1}) =~ ~s("enum" must be a list)
    assert wrong(%{"uniqueItems" => 1}) =~ "true or false"
    assert wrong(%{"anyOf" => []}) =~ ~s("anyOf" must be a list of schemas)
    assert wrong(%{"items" => [%{}]}) =~ ~s(["items"]: a schema is an object)
    assert wrong(%{"properties" => []}) =~ ~s("properties" must be an object of schemas)
    assert wrong(%{"pattern" => "("}) =~ "the pattern"
    assert wrong(%{"pattern" => 1}) =~ ~s("pattern" must be a string)
    assert wrong(%{"patternProperties" => %{"[" => true}}) =~ "the pattern"
    assert wrong(%{"$ref" => "http://example.org/s"}) =~ "nothing is fetched"
    assert wrong(%{"$ref" => "#/$defs/none"}) =~ "is not in the schema"
    assert wrong(%{"$ref" => "#/$defs/n", "$defs" => %{"n" => 1}}) =~ ~s(["$defs"]["n"]: a schema is an object)
    assert wrong(%{"$ref" => "#/title", "title" => "T"}) =~ "is not in the schema"
    assert wrong(%{"$ref" => 1}) =~ "must be a string"
    assert wrong(%{"$schema" => "http://json-schema.org/draft-07/schema#"}) =~ "2020-12"
    assert wrong(%{"properties" => %{"a" => %{"$id" => "x"}}}) =~ "only be at the top"
    assert wrong(%{"unevaluatedProperties" => false}) =~ "does not follow"
    assert wrong(%{"const" => self()}) =~ "a schema is JSON"
    assert wrong(Enum.reduce(1..65, %{}, fn _, inner -> %{"items" => inner} end)) =~ "deeper than 64"
    assert wrong(%{"enum" => [String.duplicate("x", 300_000)]}) =~ "longer than"
  end

  test "a schema that refers to itself without an end is refused, one that ends in the value is not" do
    assert wrong(%{"$ref" => "#"}) =~ "without an end"

    assert wrong(%{
             "$ref" => "#/$defs/a",
             "$defs" => %{"a" => %{"$ref" => "#/$defs/b"}, "b" => %{"$ref" => "#/$defs/a"}}
           }) =~ "without an end"

    doubling =
      Map.new(1..30, &{"d#{&1}", %{"allOf" => [%{"$ref" => "#/$defs/d#{&1 + 1}"}, %{"$ref" => "#/$defs/d#{&1 + 1}"}]}})

    assert wrong(%{"$ref" => "#/$defs/d1", "$defs" => Map.put(doubling, "d31", true)}) =~ "without an end"
    tree = %{"type" => "object", "additionalProperties" => %{"$ref" => "#"}}
    assert fits?(tree, Enum.reduce(1..90, %{}, fn _, inner -> %{"a" => inner} end))
  end

  test "a value that takes too many references is refused, in bounded time" do
    # Each level of the value doubles what is to be looked at.
    schema = %{
      "$ref" => "#/$defs/n",
      "$defs" => %{
        "n" => %{
          "anyOf" => [
            %{"items" => %{"$ref" => "#/$defs/n"}, "minItems" => 2},
            %{"items" => %{"$ref" => "#/$defs/n"}, "maxItems" => 1}
          ]
        }
      }
    }

    value = Enum.reduce(1..60, 0, fn _, inner -> [inner] end)
    schema = put_in(schema["$defs"]["n"]["type"], ["array", "string"])
    assert problem(schema, value) == ": it takes too many references of the schema to check it"
  end

  test "a pattern that takes for ever is stopped" do
    assert problem(%{"pattern" => "^(a+)+$"}, String.duplicate("a", 5_000) <> "b") =~ "takes too long to match"
  end
end
