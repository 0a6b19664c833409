defmodule Bridge.Value.VectorsTest do
  use ExUnit.Case, async: true

  alias Bridge.{
    Bytes,
    Complex,
    Error,
    Frozenset,
    NDArray,
    NpScalar,
    Record,
    Ref,
    Timedelta,
    Tool,
    UUID,
    Value,
    Variable,
    Zoned
  }

  alias Bridge.Value.Kinds

  @path Path.expand("../../../../tests/vectors/values.json", __DIR__)
  @external_resource @path
  {:ok, vectors} = @path |> File.read!() |> Bridge.JSON.decode()
  @vectors vectors
  @names %{"MalformedValue" => :malformed_value, "LimitExceeded" => :limit_exceeded}
  # A map of Elixir has no order, so that its pairs are written in that of their keys.
  @without_order "map keeps its order"

  for row <- @vectors["values"] do
    @tag row: row
    test "decodes and encodes again: #{row["name"]}", %{row: row} do
      buffers = Enum.map(row["buffers"], &Base.decode64!/1)
      assert {:ok, term} = Value.decode(row["json"], buffers)
      assert {:ok, json, again} = Value.encode(term)

      if row["canonical"] do
        assert again === buffers
        assert in_order(json, row) === in_order(row["json"], row)
      else
        assert Value.decode(json, again) === {:ok, term}
      end
    end
  end

  for row <- @vectors["malformed"] do
    @tag row: row
    test "refuses: #{row["name"]}", %{row: row} do
      assert {:error, %Error{} = error} = Value.decode(row["json"], Enum.map(row["buffers"], &Base.decode64!/1))
      assert error.name == @names[row["error"]]
      assert String.starts_with?(error.message, row["path"] <> ": ")
    end
  end

  test "only the order of a map's pairs is not kept" do
    row = Enum.find(@vectors["values"], &(&1["name"] == @without_order))
    assert {:ok, term} = Value.decode(row["json"], [])
    assert {:ok, %{"$bridge" => "map", "items" => items}, []} = Value.encode(term)
    assert Enum.sort(items) == Enum.sort(row["json"]["items"])
    assert items == Enum.sort_by(items, fn [key, _] -> elem(Value.decode(key, []), 1) end)
  end

  test "every kind has a vector" do
    tagged = for %{"json" => %{"$bridge" => kind}} <- @vectors["values"], uniq: true, do: kind
    assert Enum.sort(tagged) == Enum.sort(Kinds.names())
  end

  @terms %{
    "null" => nil,
    "true" => true,
    "integer" => -7,
    "float" => 1.5,
    "smallest int" => -9_223_372_036_854_775_808,
    "largest int" => 9_223_372_036_854_775_807,
    "text with every plane" => "é\u2028😀",
    "nested plain data" => %{"a" => [1, %{"b" => nil}], "" => true},
    "big int" => 9_223_372_036_854_775_808,
    "big negative int" => -9_223_372_036_854_775_809,
    "int that JSON has, tagged" => 255,
    "nan" => :nan,
    "infinity" => :infinity,
    "minus infinity" => :neg_infinity,
    "complex" => %Complex{real: 1.5, imag: -2.0},
    "complex not finite" => %Complex{real: :nan, imag: :neg_infinity},
    "small bytes" => %Bytes{data: <<0, 255>>},
    "bytearray" => %Bytes{data: "ab", mutable: true},
    "two buffers in order" => [
      %Bytes{data: String.duplicate("a", 65)},
      %Bytes{data: String.duplicate("b", 65)}
    ],
    "tuple" => {1, {"a"}, [2]},
    "set" => MapSet.new([3, 1, "b", nil]),
    "frozenset in a set" => MapSet.new([Frozenset.new([1, 2])]),
    "map with integer keys" => %{1 => "a", 2 => "b"},
    "map keeps its order" => %{2 => "b", "1" => "a", nil => nil, {1, 2} => []},
    "map with a NaN key" => %{:nan => 1},
    "a dict with the key of a tag" => %{"$bridge" => "int", "hex" => "ff"},
    "decimal" => %Bridge.Decimal{value: "-1.10"},
    "date" => ~D[2024-02-29],
    "time" => ~T[03:04:05.000006],
    "time with offset" => %Zoned{value: ~T[03:04:00], offset_us: 3_600_000_000},
    "naive datetime" => ~N[2024-01-02 03:04:05],
    "datetime in UTC" => ~U[2024-01-02 03:04:05.000006Z],
    "datetime with a named offset" => %Zoned{value: ~N[2024-01-02 00:00:00], offset_us: -12_600_000_000, name: "NST"},
    "datetime in a zone, folded" => %Zoned{value: ~N[2024-10-27 02:30:00], zone: "Europe/Berlin", fold: 1},
    "timedelta" => %Timedelta{days: -1, seconds: 86_399, microseconds: 999_999},
    "uuid" => %UUID{value: "12345678-1234-5678-1234-567812345678"},
    "ndarray" => {{:s, 32}, {2, 2}, <<1::32-little, 2::32-little, 3::32-little, 4::32-little>>},
    "ndarray of rank 0" => {{:f, 64}, {}, <<1.5::float-64-little>>},
    "empty ndarray" => {{:f, 32}, {0, 3}, ""},
    "ndarray of half floats" => {{:f, 16}, {1}, <<1.5::float-16-little>>},
    "ndarray of complex" => {{:c, 64}, {1}, <<1.0::float-32-little, 2.0::float-32-little>>},
    "ndarray of bool" => %NDArray{dtype: "|b1", shape: {2}, data: <<1, 0>>},
    "big-endian ndarray" => %NDArray{dtype: ">u2", shape: {2}, data: <<1::16, 2::16>>},
    "numpy scalar" => %NpScalar{dtype: "<f4", data: <<1.5::float-32-little>>},
    "numpy text" => %NpScalar{dtype: "str", data: "é"},
    "ref with its class and version" => %Ref{id: "r-1", class: "pkg.mod.Class", version: 3},
    "ref with empty members" => %Ref{id: "r"},
    "tool with a schema" => %Tool{name: "add", description: "Adds.", schema: %{"type" => "object", "$bridge" => 1}},
    "variable" => %Variable{name: "x"},
    "dataclass not loaded" => %Record{kind: :dataclass, class: "elsewhere.Point", fields: %{"x" => 1, "y" => {2}}},
    "pydantic model not loaded" => %Record{
      kind: :pydantic,
      class: "elsewhere.Model",
      fields: %{"a" => 1},
      fields_set: ["a", "b"],
      extra: %{"b" => {2}},
      private: %{"_c" => %Bytes{data: ""}}
    },
    "enum not loaded" => %Record{kind: :enum, class: "elsewhere.Colour", fields: %{"name" => "RED"}},
    "registered class not loaded" => %Record{class: "elsewhere.Prediction", fields: %{"answer" => :nan}}
  }

  test "each becomes the term that an Elixir programmer expects" do
    rows = Map.new(@vectors["values"], &{&1["name"], &1})

    for {name, term} <- @terms do
      row = Map.fetch!(rows, name)
      assert {name, Value.decode(row["json"], Enum.map(row["buffers"], &Base.decode64!/1))} === {name, {:ok, term}}
    end
  end

  test "a decimal becomes one of the package Decimal, if that holds it, and is written as it came" do
    for text <-
          ~w(-1.10 1E+30 0 -0 0.000001 0.0000001 1E-7 1.5E-9 123.456 -0E+3 0.00 Infinity -Infinity NaN
            sNaN12 -NaN NaN1) do
      tree = %{"$bridge" => "decimal", "value" => text}
      assert {:ok, %module{} = decimal} = Value.decode(tree, [], decimal: true)
      assert module == if(text in ~w(sNaN12 -NaN NaN1), do: Bridge.Decimal, else: Decimal)
      assert {:ok, again, []} = Value.encode(decimal)
      assert Value.decode(again, [], decimal: true) === {:ok, decimal}
      if text != "0.0000001", do: assert(again == tree)
    end

    assert {:ok, %{__struct__: Decimal, sign: -1, coef: 110, exp: -2}} =
             Value.decode(%{"$bridge" => "decimal", "value" => "-1.10"}, [], decimal: true)
  end

  defp in_order(%{"$bridge" => "map", "items" => items} = json, %{"name" => @without_order}) do
    %{json | "items" => Enum.sort(items)}
  end

  defp in_order(json, _row), do: json
end
