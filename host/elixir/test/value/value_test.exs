defmodule Bridge.ValueTest do
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
    Table,
    Timedelta,
    Tool,
    UUID,
    Value,
    Variable
  }

  doctest Bridge.Value
  doctest Bridge.Bytes
  doctest Bridge.Complex
  doctest Bridge.Decimal
  doctest Bridge.Frozenset
  doctest Bridge.NDArray
  doctest Bridge.NpScalar
  doctest Bridge.Record
  doctest Bridge.Ref
  doctest Bridge.Timedelta
  doctest Bridge.Tool
  doctest Bridge.UUID
  doctest Bridge.Variable
  doctest Bridge.Zoned

  defmodule Point do
    @derive {Bridge.Encodable, class: "myapp.Point", except: [:cache]}
    defstruct [:x, :y, :cache]
  end

  defmodule Plain do
    @derive Bridge.Encodable
    defstruct [:a]
  end

  defmodule Own do
    defstruct [:inner]

    defimpl Bridge.Encodable do
      def to_value(own), do: {own.inner}
    end
  end

  defmodule Endless do
    defstruct []

    defimpl Bridge.Encodable do
      def to_value(endless), do: endless
    end
  end

  defmodule Secretive do
    defstruct [:key]
  end

  defp refused(term, path \\ "value") do
    assert {:error, %Error{name: :not_serializable} = error} = Value.encode(term, path)
    assert error.remedy != ""
    error.message
  end

  defp malformed(json, buffers \\ []) do
    assert {:error, %Error{name: :malformed_value} = error} = Value.decode(json, buffers)
    error.message
  end

  defp nested(levels), do: Enum.reduce(1..levels//1, 0, fn _, inner -> [inner] end)

  describe "what cannot cross" do
    test "is named with its path and a remedy" do
      assert refused(%{"rows" => [1, {2, %{handle: self()}}]}, "result") ==
               ~s(result["rows"][1][1]["handle"]: a pid cannot cross the bridge)

      assert refused(&refused/1) =~ "a function"
      assert refused([:ok]) =~ "value[0]: the atom :ok"
      assert refused(1..2) =~ "a Range"
      assert refused(make_ref()) =~ "a reference"
      assert refused(<<1::3>>) =~ "a bitstring"
      assert refused([1 | 2]) =~ "improper"
      assert refused(%Secretive{key: 1}) =~ "Secretive cannot cross"
      assert refused(a: 1) =~ "value[0]: this pair begins with the atom :a"
      assert refused({{:f, 31}, {1}, "abcd"}) =~ "there are no arrays of {:f, 31}"
      assert refused(%Record{class: "a.B", fields: %{"x" => [self()]}}) =~ "value.x[0]: "
      assert refused(MapSet.new([self()])) =~ "value{0}: "
      assert refused(%{{1, self()} => 1}) =~ "value.keys()[0][1]: "
      assert refused(%{7 => self()}) =~ "value[7]: "
      assert refused(%Tool{name: "t", schema: %{"a" => self()}}) =~ ~s(value.schema["a"]: )
    end

    test "a binary that is no text is refused, and told to be wrapped, also as a key and when it is long" do
      for text <- [<<255>>, "abc" <> <<0xED, 0xA0, 0x80>>, String.duplicate("x", 5000) <> <<0xC3>>] do
        assert {:error, %Error{name: :not_serializable, remedy: "Send bytes: Bridge.Bytes.new(x)."}} =
                 Value.encode([text])

        assert refused(%{text => 1}) =~ "no UTF-8"
        assert refused(%{1 => text}) =~ "value[1]: this binary"
      end
    end

    test "a long key is clipped in the path" do
      assert refused(%{String.duplicate("é", 100) => self()}) =~ ~s(value["#{String.duplicate("é", 60)}…"]: a pid)
    end

    test "an error leaves no buffer behind, and the first term's root is in its path" do
      long = Bytes.new(String.duplicate("x", 100))
      assert {:error, error} = Value.encode_many([{"args[0]", [long]}, {"args[1]", [long, self()]}])
      assert error.message =~ "args[1][1]: "
    end
  end

  describe "maps" do
    test "keys that are atoms become strings, and only they" do
      assert Value.encode(%{a: 1, b: %{c: nil}}) == {:ok, %{"a" => 1, "b" => %{"c" => nil}}, []}
      assert Value.encode(%{1 => :nan, a: 2}) == {:ok, %{"$bridge" => "map", "items" => [[1, nan()], ["a", 2]]}, []}
      assert Value.encode(%{nil => 1}) == {:ok, %{"$bridge" => "map", "items" => [[nil, 1]]}, []}
    end

    test "an atom beside the string of the same name is refused" do
      assert refused(%{:a => 1, "a" => 2}) =~ ~s(value["a"]: the key :a is beside "a")
      assert refused(%{:a => 1, "a" => 2, 3 => 4}) =~ "two of its elements are equal"
    end

    test "a key called $bridge is escaped" do
      assert {:ok, %{"$bridge" => "dict", "value" => %{"$bridge" => 1}} = json, []} = Value.encode(%{"$bridge": 1})
      assert Value.decode(json, []) == {:ok, %{"$bridge" => 1}}
    end

    test "keys that are one key to Python are refused, both ways" do
      assert refused(%{1 => "a", 1.0 => "b"}) =~ "two of its elements are equal"
      assert refused(MapSet.new([true, 1])) =~ "two of its elements are equal"
      assert refused(MapSet.new([{1, 2}, {1.0, 2}])) =~ "two of its elements are equal"
      assert malformed(%{"$bridge" => "set", "items" => [1, 1.0]}) =~ "two of its elements are equal"
      assert malformed(%{"$bridge" => "map", "items" => [[false, 1], [0, 2]]}) =~ "two of its elements are equal"
    end

    test "what Python cannot hash is refused as a key and in a set, both ways" do
      for key <- [[1], %{"a" => 1}, {1, [2]}, MapSet.new([1]), Bytes.new("a", mutable: true), {{:u, 8}, {1}, "a"}] do
        assert refused(%{key => 1}) =~ "cannot be hashed"
        assert refused(MapSet.new([key])) =~ "cannot be hashed"
        {:ok, json, buffers} = Value.encode(key)
        assert malformed(%{"$bridge" => "set", "items" => [json]}, buffers) =~ "cannot be hashed"
      end

      assert {:ok, _, []} =
               Value.encode(MapSet.new([{1, "a"}, Frozenset.new([1]), Bytes.new("a"), ~D[2024-01-01], nil, :nan]))
    end
  end

  describe "sets" do
    test "are written alike, whatever order they were made in, with their bytes inline" do
      items = Enum.map(1..50, &Bytes.new(String.duplicate(<<&1>>, 70)))
      assert {:ok, %{"items" => written}, []} = Value.encode(MapSet.new(items))
      assert {:ok, %{"items" => ^written}, []} = Value.encode(MapSet.new(Enum.reverse(items)))
      assert length(written) == 50
    end

    test "bytes after a set are in buffers again" do
      long = Bytes.new(String.duplicate("x", 65))
      assert {:ok, [%{"items" => [%{"base64" => _}]}, %{"buffer" => 0}], [_]} = Value.encode([MapSet.new([long]), long])
    end
  end

  describe "structs" do
    test "cross as what Bridge.Encodable makes of them" do
      assert Value.encode(%Point{x: 1, y: {2}, cache: self()}) ==
               Value.encode(Record.new("myapp.Point", %{"x" => 1, "y" => {2}}, kind: :dataclass))

      assert Value.encode([%Plain{a: nil}]) == {:ok, [%{"a" => nil}], []}
      assert Value.encode(%Own{inner: 1}) == {:ok, %{"$bridge" => "tuple", "items" => [1]}, []}
      assert refused(%Endless{}) =~ "nested deeper than 100 levels"
    end

    test "of ours that are not what they should be are refused" do
      for term <- [
            %Bytes{data: nil},
            %Complex{real: 1, imag: 2.0},
            %Bridge.Decimal{value: "1_0"},
            %UUID{value: "x"},
            %Timedelta{seconds: 86_400},
            %Timedelta{days: nil},
            %Bridge.Zoned{value: ~T[00:00:00], zone: "../../etc/passwd"},
            %Bridge.Zoned{value: ~D[2024-01-01]},
            %Bridge.Zoned{value: ~T[00:00:00], offset_us: 86_400_000_000},
            %Bridge.Zoned{value: ~T[00:00:00], fold: 2},
            %NDArray{dtype: "|O", shape: {1}, data: "12345678"},
            %NDArray{dtype: "<f4", shape: {2}, data: "1234"},
            %NDArray{dtype: "<f4", shape: [1], data: "1234"},
            %NpScalar{dtype: "<f4", data: ""},
            %NpScalar{dtype: "str", data: <<255>>},
            %Table{library: "os", data: ""},
            %Table{library: "polars", data: "no stream"},
            %Record{class: :a, fields: %{}},
            %Record{class: "a.B", fields: [], kind: :dataclass},
            %Record{class: "a.B", kind: :other},
            %Record{class: String.duplicate("a", 1001)},
            %Frozenset{items: [1]},
            %Ref{id: nil},
            %Ref{id: "r", version: -1},
            %Tool{name: "t", schema: []},
            %Variable{name: :x},
            {{:f, 32}, {2}, "1234"},
            {{:f, 32}, {-1}, ""}
          ] do
        refused(term)
      end
    end

    test "dates beyond Python's years, and of other calendars, are refused" do
      assert refused(~D[-0001-01-01]) =~ "years 1 to 9999"
      assert refused(%{~D[2024-01-01] | year: 10_000}) =~ "years 1 to 9999"
      assert refused(%{~D[2024-01-01] | calendar: Other}) =~ "calendar"
    end

    test "a moment with any precision is the same moment when it comes back" do
      for moment <- [~T[01:02:03.1], ~N[2024-01-02 03:04:05.120], ~U[2024-01-02 03:04:05.000Z]] do
        {:ok, json, []} = Value.encode(moment)
        {:ok, back} = Value.decode(json, [])
        assert moment.__struct__.compare(moment, back) == :eq
      end
    end

    test "a fold is kept where Elixir's own have none" do
      for {kind, value} <- [{"time", "01:02:03"}, {"datetime", "2024-01-02T03:04:05"}] do
        tree = %{"$bridge" => kind, "value" => value, "fold" => 1}
        assert {:ok, %Bridge.Zoned{fold: 1} = moment} = Value.decode(tree, [])
        assert Value.encode(moment) == {:ok, tree, []}
      end
    end

    test "a moment in a zone that is not known here is refused rather than guessed" do
      moment = %{~U[2024-01-02 03:04:05Z] | time_zone: "Europe/Berlin", utc_offset: 3600, zone_abbr: "CET"}
      assert refused(moment) =~ ~s("Europe/Berlin" is not known here)
    end
  end

  describe "limits" do
    test "100 levels cross, 101 do not, whatever they are of" do
      assert {:ok, json, []} = Value.encode(nested(100))
      assert Value.decode(json, []) == {:ok, nested(100)}
      assert refused(nested(101)) =~ "nested deeper than 100 levels"

      tuples = Enum.reduce(1..101, 0, fn _, inner -> {inner} end)
      assert refused(tuples) == "value#{String.duplicate("[0]", 100)}: nested deeper than 100 levels"
      maps = Enum.reduce(1..101, 0, fn _, inner -> %{"a" => inner} end)
      assert refused(maps) =~ "nested deeper than 100 levels"
      assert {:error, %Error{name: :limit_exceeded}} = Value.decode(maps, [])
      assert {:error, %Error{name: :limit_exceeded}} = Value.decode(nested(101), [])
      sets = Enum.reduce(1..101, 0, fn _, inner -> Frozenset.new([inner]) end)
      assert refused(sets) =~ "nested deeper than 100 levels"
      records = Enum.reduce(1..101, 0, fn _, inner -> Record.new("a.B", %{"x" => inner}) end)
      assert refused(records) =~ "nested deeper than 100 levels"
    end

    test "lists that share lists are counted each time, and refused soon" do
      wide = Enum.reduce(1..9, List.duplicate(0, 100), fn _, inner -> List.duplicate(inner, 100) end)
      assert refused(wide) =~ "more than 10000000 items in one value"
      assert refused([:nan | wide]) =~ "more than 10000000 items in one value"
    end

    test "64 items may have one hash in Python, 65 may not" do
      prime = 0x1FFF_FFFF_FFFF_FFFF
      alike = fn count -> Enum.map(1..count, &(&1 * prime)) end
      assert {:ok, json, []} = Value.encode(MapSet.new(alike.(64)))
      assert {:ok, _} = Value.decode(json, [])
      assert refused(MapSet.new(alike.(65))) =~ "same hash"
      assert refused(Map.new(alike.(65), &{&1, nil})) =~ "same hash"
      {:ok, items, []} = Value.encode(alike.(65))
      assert {:error, %Error{name: :limit_exceeded}} = Value.decode(%{"$bridge" => "set", "items" => items}, [])
    end

    test "a class's name has at most 1,000 characters" do
      name = &String.duplicate("é", &1)
      assert {:ok, json, []} = Value.encode(Record.new(name.(1000), %{}))
      assert {:ok, %Record{}} = Value.decode(json, [])
      assert {:error, %Error{name: :limit_exceeded}} = Value.decode(%{json | "class" => name.(1001)}, [])
    end

    test "arrays: 64 dimensions, 16 structs in structs, a million items of no bytes" do
      array = &%{"$bridge" => "ndarray", "dtype" => &1, "shape" => &2, "order" => "C", "buffer" => 0}
      deep = fn levels -> Enum.reduce(1..levels, "|i1", fn _, inner -> [["a", inner]] end) end
      assert {:ok, _} = Value.decode(array.("|i1", List.duplicate(1, 64)), ["x"])
      assert {:ok, _} = Value.decode(array.(deep.(16), [1]), ["x"])
      assert {:error, %Error{name: :limit_exceeded}} = Value.decode(array.(deep.(17), [1]), ["x"])
      assert {:ok, _} = Value.decode(array.("|V0", [1_000_000]), [""])
      assert {:error, %Error{name: :limit_exceeded}} = Value.decode(array.("|V0", [1_000_001]), [""])
      assert malformed(array.("<i3", [1]), ["xxx"]) =~ "none that numpy knows"
      assert malformed(array.("<M8[parsec]", [1]), ["12345678"]) =~ "none that numpy knows"
      assert malformed(array.([["a", "|i1"], ["a", "|i1"]], [1]), ["xx"]) =~ "none that numpy knows"
      assert malformed(array.("|i1", [0, 4_611_686_018_427_387_904, 4]), [""]) =~ "shape"
    end

    test "a table may not claim more rows than it has bytes for, nor lie about its parts" do
      {:ok, vectors} =
        "../../../../tests/vectors/values.json" |> Path.expand(__DIR__) |> File.read!() |> Bridge.JSON.decode()

      for %{"json" => %{"$bridge" => "table"} = json, "buffers" => [stream]} <- vectors["values"] do
        stream = Base.decode64!(stream)
        assert {:ok, %Table{}} = Value.decode(json, [stream])

        for size <- 0..(byte_size(stream) - 1)//3 do
          case Value.decode(json, [binary_part(stream, 0, size)]) do
            # Where the end marker is missing it is still a stream.
            {:ok, %Table{}} -> assert size > 8
            {:error, error} -> assert error.name == :malformed_value
          end
        end

        for at <- 0..(byte_size(stream) - 1) do
          <<head::binary-size(at), byte, rest::binary>> = stream
          damaged = <<head::binary, Bitwise.bxor(byte, 0xFF), rest::binary>>

          case Value.decode(json, [damaged]) do
            {:ok, %Table{}} -> :ok
            {:error, error} -> assert error.name in [:malformed_value, :limit_exceeded]
          end
        end
      end
    end
  end

  describe "buffers" do
    test "are shared by the values of one message, each by one value" do
      [a, b, c] = for char <- ["a", "b", "c"], do: Bytes.new(String.duplicate(char, 65))
      assert {:ok, [first, 7, second], buffers} = Value.encode_many([{"args[0]", [a, b]}, {"args[1]", 7}, {"k", {c}}])
      assert buffers == [a.data, b.data, c.data]
      trees = [{"args[0]", first}, {"args[1]", 7}, {"k", second}]
      assert Value.decode_many(trees, buffers) == {:ok, [[a, b], 7, {c}]}
      assert {:error, error} = Value.decode_many(trees ++ [{"again", second}], buffers)
      assert error.message =~ "again[0]: buffer 2 is used twice"
      assert {:error, error} = Value.decode_many(tl(trees), buffers)
      assert error.message =~ "args[1]: buffer 0 belongs to nothing in it"
    end

    test "are numbered from where the message's others end" do
      array = {{:u, 8}, {2}, "ab"}
      assert {:ok, %{"buffer" => 3}, ["ab"]} = Value.encode(array, "value", first: 3)
    end

    test "are not copied" do
      data = :binary.copy("x", 1_000_000)
      assert {:ok, json, [buffer]} = Value.encode({{:u, 8}, {1_000_000}, data})
      assert :erts_debug.same(buffer, data)
      assert {:ok, {_, _, back}} = Value.decode(json, [buffer])
      assert :erts_debug.same(back, data)
    end
  end

  describe "tags" do
    test "become what the hook makes of them, wherever they are" do
      json = %{
        "a" => [%{"$bridge" => "ref", "id" => "r"}],
        "b" => %{
          "$bridge" => "tuple",
          "items" => [%{"$bridge" => "variable", "name" => "x"}, %{"$bridge" => "tool", "name" => "t"}]
        }
      }

      hook = fn
        %Ref{id: id} -> {:ref, id}
        %Variable{name: name} -> {:variable, name}
        %Tool{name: name} -> {:tool, name}
      end

      assert Value.decode(json, [], hook: hook) ==
               {:ok, %{"a" => [{:ref, "r"}], "b" => {{:variable, "x"}, {:tool, "t"}}}}
    end

    test "do not carry what is of this host only" do
      assert Value.encode(%Ref{id: "r", session: "demo", bridge: MyBridge}) ==
               {:ok, %{"$bridge" => "ref", "id" => "r"}, []}
    end
  end

  describe "numbers" do
    test "of any size go through hexadecimal and back" do
      for bits <- [63, 64, 65, 127, 128, 1000, 100_000], sign <- [1, -1], off <- [-1, 0, 1] do
        number = sign * Bitwise.bsl(1, bits) + off
        assert {:ok, json, []} = Value.encode(number)
        assert Value.decode(json, []) == {:ok, number}
        if number not in -0x8000_0000_0000_0000..0x7FFF_FFFF_FFFF_FFFF, do: assert(%{"hex" => _} = json)
      end
    end

    test "of NumPy are read as Elixir's" do
      value = fn dtype, data -> NpScalar.value(%NpScalar{dtype: dtype, data: data}) end
      assert value.("<i8", <<-5::64-little>>) == {:ok, -5}
      assert value.(">i2", <<-5::16>>) == {:ok, -5}
      assert value.("|u1", <<200>>) == {:ok, 200}
      assert value.("<f2", <<1.5::float-16-little>>) == {:ok, 1.5}
      assert value.(">f8", <<0.1::float-64>>) == {:ok, 0.1}
      assert value.("<f4", <<0x7FC00000::32-little>>) == {:ok, :nan}
      assert value.("<f8", <<0xFFF0000000000000::64-little>>) == {:ok, :neg_infinity}
      assert value.("<f2", <<0x7C00::16-little>>) == {:ok, :infinity}
      assert value.("|b1", <<1>>) == {:ok, true}
      assert value.("<M8[D]", <<1::64>>) == :error
      assert value.("<f16", <<0::128>>) == :error
    end
  end

  describe "Inspect" do
    test "shows what a person wants to know, shortly" do
      prediction = Record.new("dspy.Prediction", %{"answer" => "Paris", "the score" => 1.0})
      assert inspect(prediction) == ~s[dspy.Prediction(answer: "Paris", "the score": 1.0)]
      assert inspect(Record.new("a.Colour", %{"name" => "RED"}, kind: :enum)) == "a.Colour.RED"
      assert inspect([Record.new("a.B", %{})]) == "[a.B()]"
      long = Bytes.new(:binary.copy(<<7>>, 3_000_000))
      assert String.length(inspect(long)) < 200
      assert inspect(long) =~ "2.9 MiB"
      assert inspect(%Table{library: "polars", data: :binary.copy("x", 2048)}) == "#Bridge.Table<polars, 2.0 KiB>"

      assert inspect(%Bridge.Zoned{value: ~N[2024-01-02 00:00:00], offset_us: -12_600_000_000, name: "NST"}) ==
               "#Bridge.Zoned<2024-01-02T00:00:00 -03:30 NST>"
    end

    test "does not fail on what is none" do
      for struct <- [
            %Bytes{data: nil},
            %Timedelta{days: nil},
            %Bridge.Zoned{value: 1},
            %NDArray{dtype: 1, shape: 2, data: 3},
            %NpScalar{dtype: "<f4", data: ""},
            %Frozenset{items: [1]},
            %Record{class: nil, fields: [1]}
          ] do
        assert is_binary(inspect(struct))
        refute inspect(struct) =~ "Inspect.Error"
      end
    end
  end

  defp nan, do: %{"$bridge" => "float", "value" => "nan"}
end
