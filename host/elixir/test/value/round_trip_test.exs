defmodule Bridge.Value.RoundTripTest do
  # Not async: it counts the atoms of the BEAM, and changes the time zone database.
  use ExUnit.Case, async: false

  alias Bridge.{
    Bytes,
    Complex,
    Error,
    Frozenset,
    NDArray,
    NpScalar,
    Record,
    Ref,
    TestKernels,
    Timedelta,
    Tool,
    UUID,
    Value,
    Variable,
    Zoned
  }

  alias Bridge.Value.Kinds

  defmodule Plain do
    @derive Bridge.Encodable
    defstruct [:a]
  end

  defmodule Secretive do
    defstruct [:key]
  end

  defmodule Zones do
    # Of Berlin's clock what the tests need: summer time in 2024.
    @behaviour Calendar.TimeZoneDatabase

    @spring ~N[2024-03-31 01:00:00]
    @autumn ~N[2024-10-27 01:00:00]

    @impl true
    def time_zone_period_from_utc_iso_days(iso_days, "Europe/Berlin") do
      utc = iso_days |> Calendar.ISO.naive_datetime_from_iso_days() |> naive()
      summer? = NaiveDateTime.compare(utc, @spring) != :lt and NaiveDateTime.compare(utc, @autumn) == :lt
      {:ok, if(summer?, do: summer(), else: winter())}
    end

    def time_zone_period_from_utc_iso_days(_iso_days, _zone), do: {:error, :time_zone_not_found}

    @impl true
    def time_zone_periods_from_wall_datetime(wall, "Europe/Berlin") do
      wall = NaiveDateTime.new!(wall.year, wall.month, wall.day, wall.hour, wall.minute, wall.second, wall.microsecond)
      in? = fn from, to -> NaiveDateTime.compare(wall, from) != :lt and NaiveDateTime.compare(wall, to) == :lt end

      cond do
        in?.(~N[2024-03-31 02:00:00], ~N[2024-03-31 03:00:00]) ->
          {:gap, {winter(), ~N[2024-03-31 02:00:00]}, {summer(), ~N[2024-03-31 03:00:00]}}

        in?.(~N[2024-10-27 02:00:00], ~N[2024-10-27 03:00:00]) ->
          {:ambiguous, summer(), winter()}

        in?.(~N[2024-03-31 03:00:00], ~N[2024-10-27 02:00:00]) ->
          {:ok, summer()}

        true ->
          {:ok, winter()}
      end
    end

    def time_zone_periods_from_wall_datetime(_wall, _zone), do: {:error, :time_zone_not_found}

    defp naive({year, month, day, hour, minute, second, microsecond}) do
      NaiveDateTime.new!(year, month, day, hour, minute, second, microsecond)
    end

    defp summer, do: %{utc_offset: 3600, std_offset: 3600, zone_abbr: "CEST"}
    defp winter, do: %{utc_offset: 3600, std_offset: 0, zone_abbr: "CET"}
  end

  defp python(rows) do
    path = Path.join(System.tmp_dir!(), "bridge-values-#{System.unique_integer([:positive])}-#{System.pid()}")
    on_exit(fn -> File.rm(path) end)
    File.write!(path, Enum.map(rows, &[Bridge.JSON.encode!(&1), ?\n]))

    {out, 0} =
      System.cmd("sh", ["-c", ~s(exec "$0" "$1" < "$2"), TestKernels.python(), Path.expand("peer.py", __DIR__), path])

    answers = out |> String.split("\n", trim: true) |> Enum.map(&elem(Bridge.JSON.decode(&1), 1))
    assert length(answers) == length(rows)
    answers
  end

  defp row(term, more \\ %{}) do
    assert {:ok, json, buffers} = Value.encode(term)
    Map.merge(more, %{"json" => json, "buffers" => Enum.map(buffers, &Base.encode64/1)})
  end

  defp read(%{"json" => json, "buffers" => buffers}), do: Value.decode(json, Enum.map(buffers, &Base.decode64!/1))
  defp read(%{"error" => error}), do: {:python, error}

  @long String.duplicate(<<200>>, 70)
  @pairs [
    {nil, "None"},
    {[true, 0, -1, 1.0, 1.0e-7, 1.0e300], "[True, 0, -1, 1.0, 1e-7, 1e300]"},
    {%{question: "Wo? 😀", nested: %{a: [nil]}}, "{'question': 'Wo? \\U0001f600', 'nested': {'a': [None]}}"},
    {Bitwise.bsl(1, 70), "2**70"},
    {-Bitwise.bsl(1, 64), "-2**64"},
    {[:nan, :infinity, :neg_infinity], "[math.nan, math.inf, -math.inf]"},
    {%Complex{real: 1.0, imag: -2.5}, "1-2.5j"},
    {%Bridge.Decimal{value: "-1.10"}, "Decimal('-1.10')"},
    {%{__struct__: Decimal, sign: -1, coef: 11, exp: -10}, "Decimal('-1.1E-9')"},
    {%{__struct__: Decimal, sign: 1, coef: :inf, exp: 0}, "Decimal('Infinity')"},
    {{1, {"a"}, []}, "(1, ('a',), [])"},
    {MapSet.new([1, "b", nil, {2}]), "{1, 'b', None, (2,)}"},
    {Frozenset.new([Frozenset.new([])]), "frozenset({frozenset()})"},
    {%{1 => "a", nil => [2]}, "{1: 'a', None: [2]}"},
    {%{"$bridge" => 1}, "{'$bridge': 1}"},
    {%Bytes{data: <<0, 255>>}, "b'\\0\\xff'"},
    {%Bytes{data: @long}, "b'\\xc8' * 70"},
    {%Bytes{data: @long, mutable: true}, "bytearray(b'\\xc8' * 70)"},
    {~D[2024-02-29], "date(2024, 2, 29)"},
    {~T[01:02:03.5], "time(1, 2, 3, 500000)"},
    {~N[2024-01-02 03:04:05], "datetime(2024, 1, 2, 3, 4, 5)"},
    {~U[2024-01-02 03:04:05.000006Z], "datetime(2024, 1, 2, 3, 4, 5, 6, tzinfo=timezone.utc)"},
    {%Zoned{value: ~T[01:00:00], offset_us: 3_600_000_000, name: "X"},
     "time(1, tzinfo=timezone(timedelta(hours=1), 'X'))"},
    {%Zoned{value: ~N[2024-10-27 02:30:00], zone: "Europe/Berlin", fold: 1},
     "datetime(2024, 10, 27, 2, 30, tzinfo=ZoneInfo('Europe/Berlin'), fold=1)"},
    {Timedelta.from_microseconds(-1), "timedelta(microseconds=-1)"},
    {%UUID{value: "12345678-1234-5678-1234-567812345678"}, "UUID('12345678-1234-5678-1234-567812345678')"},
    {{{:f, 32}, {2, 2}, <<1.0::float-32-little, 2.0::float-32-little, 3.0::float-32-little, 4.0::float-32-little>>},
     "np.array([[1, 2], [3, 4]], '<f4')"},
    {{{:s, 8}, {0}, ""}, "np.array([], 'i1')"},
    {{{:c, 128}, {}, <<1.0::float-64-little, 2.0::float-64-little>>}, "np.array(1+2j)"},
    {%NDArray{
       dtype: "<i2",
       shape: {2, 2},
       order: "F",
       data: <<1::16-little, 2::16-little, 3::16-little, 4::16-little>>
     }, "np.asfortranarray(np.array([[1, 3], [2, 4]], '<i2'))"},
    {%NpScalar{dtype: "<f4", data: <<1.5::float-32-little>>}, "np.float32(1.5)"},
    {Record.new("elsewhere.Point", %{"x" => {1}}, kind: :dataclass),
     "Record('elsewhere.Point', {'x': (1,)}, 'dataclass')"},
    {Record.new("elsewhere.C", %{"name" => "RED"}, kind: :enum), "Record('elsewhere.C', {'name': 'RED'}, 'enum')"},
    {Record.new("elsewhere.M", %{"a" => 1}, kind: :pydantic, fields_set: []),
     "Record('elsewhere.M', {'a': 1}, 'pydantic', {'fields_set': []})"},
    {%Ref{id: "r", class: "a.B", version: 2}, "Ref('r', 'a.B', 2)"},
    {%Tool{name: "t", schema: %{type: "object"}}, "ToolRef('t', '', {'type': 'object'})"},
    {%Variable{name: "x"}, "VariableRef('x')"}
  ]

  test "Python reads of each kind what Elixir wrote, and Elixir what Python writes of it" do
    rows = for {term, python} <- @pairs, do: row(term, %{"python" => python})

    for {{{_term, python}, row}, answer} <- @pairs |> Enum.zip(rows) |> Enum.zip(python(rows)) do
      assert {python, answer["error"]} == {python, nil}
      assert {python, read(answer)} === {python, read(row)}
      # Byte for byte the same: Python writes of the value what Elixir did.
      assert {python, answer} === {python, Map.delete(row, "python")}
    end
  end

  test "random terms come back the same, here and by way of Python" do
    :rand.seed(:exsss, {1, 2, 3})
    terms = for _ <- 1..500, do: random(4)
    rows = Enum.map(terms, &row/1)
    for {term, row} <- Enum.zip(terms, rows), do: assert(read(row) === {:ok, term})
    for {term, answer} <- Enum.zip(terms, python(rows)), do: assert(read(answer) === {:ok, term})
  end

  test "nothing on the wire becomes an atom or an exception, however wrong it is" do
    garbage = fn ->
      for _ <- 1..3000 do
        case Value.decode(garbage(4), pick([[], [<<1, 2>>], [<<1, 2>>, @long]])) do
          {:ok, _} -> :ok
          {:error, %Error{name: name}} when name in [:malformed_value, :limit_exceeded] -> name
        end
      end
    end

    :rand.seed(:exsss, {4, 5, 6})
    seen = garbage.()
    assert :malformed_value in seen and :ok in seen
    before = :erlang.system_info(:atom_count)
    garbage.()
    assert :erlang.system_info(:atom_count) == before
  end

  test "what is no JSON at all is malformed" do
    for term <- [
          self(),
          :atom,
          {1},
          [1 | 2],
          %{1 => 2},
          %{"a" => %{b: 1}},
          <<1::3>>,
          %Bytes{data: ""},
          %{"$bridge" => "set", "items" => [1 | 2]}
        ] do
      assert {:error, %Error{name: :malformed_value}} = Value.decode(term, [])
    end
  end

  test "where the time zone database knows the zone, a moment is a DateTime, also in the hour that comes twice" do
    before = Calendar.get_time_zone_database()
    Calendar.put_time_zone_database(Zones)
    on_exit(fn -> Calendar.put_time_zone_database(before) end)

    for {wall, fold, offset} <- [
          {~N[2024-07-01 12:00:00], 0, 7200},
          {~N[2024-10-27 02:30:00], 0, 7200},
          {~N[2024-10-27 02:30:00], 1, 3600}
        ] do
      tree = %{"$bridge" => "datetime", "value" => NaiveDateTime.to_iso8601(wall), "zone" => "Europe/Berlin"}
      tree = if fold == 1, do: Map.put(tree, "fold", 1), else: tree
      assert {:ok, %DateTime{} = moment} = Value.decode(tree, [])
      assert moment.utc_offset + moment.std_offset == offset
      assert Value.encode(moment) == {:ok, tree, []}
    end

    # The hour that is left out, a fold where there is none, and a zone that is not known: kept as they came.
    for {wall, zone, fold} <- [
          {"2024-03-31T02:30:00", "Europe/Berlin", 0},
          {"2024-07-01T12:00:00", "Europe/Berlin", 1},
          {"2024-07-01T12:00:00", "Etc/UTC", 0}
        ] do
      tree = %{"$bridge" => "datetime", "value" => wall, "zone" => zone}
      tree = if fold == 1, do: Map.put(tree, "fold", 1), else: tree
      assert {:ok, %Zoned{} = moment} = Value.decode(tree, [])
      assert Value.encode(moment) == {:ok, tree, []}
    end
  end

  test "a struct made after the protocol was consolidated crosses too, as in a Livebook" do
    {:ok, consolidated} = Protocol.consolidate(Bridge.Encodable, [])
    {:module, _} = :code.load_binary(Bridge.Encodable, ~c"consolidated", consolidated)

    on_exit(fn ->
      :code.purge(Bridge.Encodable)
      :code.delete(Bridge.Encodable)
    end)

    assert Protocol.consolidated?(Bridge.Encodable)
    assert Value.encode(struct!(__MODULE__.Plain, a: 1)) == {:ok, %{"a" => 1}, []}
    assert {:error, %Error{name: :not_serializable}} = Value.encode(struct!(__MODULE__.Secretive, key: 1))
    assert Bridge.Schema.validate(%{"required" => ["a"]}, struct!(__MODULE__.Plain, a: 1)) == :ok
  end

  test "tensors of Nx are arrays, and plain arrays become tensors when that is asked for" do
    # Nx is not a dependency: what the codec calls of it, and nothing else.
    Code.compiler_options(ignore_module_conflict: true)

    defmodule Elixir.Nx do
      def to_binary(%{data: data}), do: data
      def from_binary(data, type), do: %{__struct__: Nx.Tensor, type: type, shape: {:flat}, names: [nil], data: data}
      def reshape(tensor, shape), do: %{tensor | shape: shape, names: List.duplicate(nil, tuple_size(shape))}
    end

    on_exit(fn ->
      :code.purge(Nx)
      :code.delete(Nx)
    end)

    data = <<1.0::float-32-little, 2.0::float-32-little>>
    tensor = %{__struct__: Nx.Tensor, type: {:f, 32}, shape: {1, 2}, names: [nil, nil], data: data}
    assert {:ok, json, [^data]} = Value.encode(tensor)
    assert {:ok, ^json, [^data]} = Value.encode({{:f, 32}, {1, 2}, data})
    assert Value.decode(json, [data], nx: true) === {:ok, tensor}
    assert Value.decode(json, [data]) === {:ok, {{:f, 32}, {1, 2}, data}}
    assert {:error, %Error{name: :not_serializable}} = Value.encode(%{tensor | names: [:x, :y]})
    assert {:error, %Error{name: :not_serializable}} = Value.encode(%{tensor | type: {:bf, 16}})
    assert {:error, %Error{name: :not_serializable}} = Value.encode(%{tensor | shape: {3}})
  end

  # -- random ------------------------------------------------------------------

  defp random(0), do: scalar()

  defp random(depth) do
    case :rand.uniform(14) do
      n when n <= 4 ->
        scalar()

      n when n <= 6 ->
        some(fn -> random(depth - 1) end)

      n when n <= 8 ->
        Map.new(some(fn -> {text(), random(depth - 1)} end))

      9 ->
        List.to_tuple(some(fn -> random(depth - 1) end))

      10 ->
        MapSet.new(some(&key/0))

      11 ->
        Frozenset.new(some(&key/0))

      12 ->
        Map.new(some(fn -> {key(), random(depth - 1)} end))

      13 ->
        Record.new("elsewhere.Thing", Map.new(some(fn -> {text(), random(depth - 1)} end)), kind: :dataclass)

      14 ->
        Record.new("elsewhere.M", %{"a" => random(depth - 1)},
          kind: :pydantic,
          fields_set: ["a"],
          extra: %{"$bridge" => random(depth - 1)}
        )
    end
  end

  defp some(make), do: for(_ <- 1..(:rand.uniform(5) - 1)//1, do: make.())
  defp pick(list), do: Enum.random(list)

  defp scalar do
    pick([
      fn -> nil end,
      fn -> pick([true, false]) end,
      fn -> pick([1, -1]) * :rand.uniform(Bitwise.bsl(1, pick([3, 62, 64, 200]))) end,
      fn -> :rand.normal() * :math.pow(10, :rand.uniform(300) - 150) end,
      fn -> pick([:nan, :infinity, :neg_infinity]) end,
      &text/0,
      fn -> %Bytes{data: :rand.bytes(:rand.uniform(130) - 1), mutable: pick([true, false])} end,
      fn -> Date.add(~D[0001-01-01], :rand.uniform(3_000_000)) end,
      fn -> ~U[2000-01-01 00:00:00.000001Z] |> DateTime.add(:rand.uniform(1_000_000_000)) end,
      fn -> Timedelta.from_microseconds(pick([1, -1]) * :rand.uniform(1_000_000_000_000_000)) end,
      fn -> {{:u, 16}, {:rand.uniform(3), 2}, ""} |> filled() end,
      fn -> %Ref{id: text() <> "r", version: pick([nil, 3])} end,
      fn -> %Variable{name: text()} end
    ]).()
  end

  defp filled({type, {rows, columns} = shape, _}), do: {type, shape, :rand.bytes(2 * rows * columns)}

  defp text,
    do:
      for(_ <- 1..(:rand.uniform(6) - 1)//1, into: "", do: <<pick([?a, ?", ?\\, ?\n, 0, ?é, 0x2028, 0x1F600])::utf8>>)

  # What cannot be equal to another of them in Python.
  defp key do
    pick([
      &text/0,
      fn -> :rand.uniform(1_000_000) end,
      fn -> {text(), :rand.uniform(9)} end,
      fn -> %Bytes{data: :rand.bytes(70)} end,
      fn -> nil end
    ]).()
  end

  @members ~w(
    items value class fields fields_set buffer base64 hex shape dtype order library type name
    zone offset_us days id real imag text fold seconds microseconds schema version extra private
    description freq
  )

  defp garbage(0),
    do: pick([nil, true, 0, 1, -1, 1.5, "", "a", "<f4", "C", "polars", "nan", "2024-01-01", "AA==", "ff", [], %{}])

  defp garbage(depth) do
    case :rand.uniform(6) do
      1 ->
        garbage(0)

      2 ->
        some(fn -> garbage(depth - 1) end)

      3 ->
        Map.new(some(fn -> {pick(@members ++ ["$bridge", random_name()]), garbage(depth - 1)} end))

      4 ->
        Map.new([
          {"$bridge", pick(Kinds.names() ++ [random_name()])} | some(fn -> {pick(@members), garbage(depth - 1)} end)
        ])

      _ ->
        near_miss(depth)
    end
  end

  # A kind with about the members that it must have.
  defp near_miss(depth) do
    kind = pick(Kinds.names())

    members =
      pick([
        ~w(items),
        ~w(value),
        ~w(class fields),
        ~w(class name),
        ~w(dtype shape order buffer),
        ~w(library buffer),
        ~w(hex),
        ~w(base64),
        ~w(buffer),
        ~w(id version),
        ~w(name schema),
        ~w(days seconds microseconds),
        ~w(class fields fields_set extra)
      ])

    members |> Map.new(&{&1, garbage(depth - 1)}) |> Map.put("$bridge", kind)
  end

  defp random_name, do: "n" <> Integer.to_string(:rand.uniform(1_000_000_000))
end
