defmodule Bridge.JSONTest do
  use ExUnit.Case, async: true

  alias Bridge.JSON

  doctest JSON

  test "any JSON comes back as it went, integers of any size exact and floats still floats" do
    :rand.seed(:exsss, {1, 2, 3})

    for _ <- 1..500 do
      term = term(4)
      assert JSON.decode(IO.iodata_to_binary(JSON.encode!(term))) == {:ok, term}
      assert JSON.decode(JSON.canonical(term)) == {:ok, term}
    end
  end

  test "floats come back bit by bit" do
    for float <- [0.1, 1.0, -0.0, 1.0e22, 5.0e-324, 1.7976931348623157e308, 123_456_789.0, 1.0e-7] do
      {:ok, read} = [float] |> JSON.encode!() |> IO.iodata_to_binary() |> JSON.decode()
      assert [<<float::float>>] == Enum.map(read, &<<&1::float>>)
    end

    assert JSON.decode("[1e2, 1E+2, 100, -0]") === {:ok, [100.0, 100.0, 100, 0]}
  end

  test "every character comes back, and no control character is written as it is" do
    for range <- [0..0xD7FF, 0xE000..0xFFFF, 0x1F300..0x1F6FF] do
      text = List.to_string(Enum.to_list(range))
      written = JSON.canonical(text)
      assert JSON.decode(written) == {:ok, text}
      refute written =~ ~r/[\x00-\x1f]/
    end

    assert JSON.canonical("a\"b\\c\nd\u0001é✓😀") == ~S("a\"b\\c\nd\u0001é✓😀")
  end

  test "an escape is found at every place of a string" do
    for before <- 0..9, follow <- 0..9, special <- ["\n", "\"", "é", "✓", "😀", "\u001f"] do
      text = String.duplicate("x", before) <> special <> String.duplicate("y", follow)
      assert JSON.decode(JSON.canonical([text, text])) == {:ok, [text, text]}
    end
  end

  test "canonical text has the members in the order of their names, however many there are" do
    map = Map.new(1..100, &{"k#{&1}", %{"b" => &1, "a" => []}})
    names = map |> Map.keys() |> Enum.sort()
    members = Enum.map_join(names, ",", fn "k" <> n -> ~s("k#{n}":{"a":[],"b":#{n}}) end)
    assert JSON.canonical(map) == "{" <> members <> "}"
  end

  test "what is no JSON is refused" do
    for text <- [
          "",
          " ",
          "{",
          "[1,]",
          "nul",
          "NaN",
          "Infinity",
          "01",
          "1.",
          "+1",
          "'a'",
          "1 2",
          "{} x",
          ~s({"a"}),
          ~s({a: 1}),
          ~s("\\ud800"),
          ~s("\\x"),
          "\"\xFF\"",
          "\"a\nb\"",
          "1e400",
          String.duplicate("[", 100_000)
        ] do
      assert JSON.decode(text) == {:error, :invalid}, inspect(text, limit: 20, printable_limit: 20)
    end
  end

  test "random bytes are read or refused, and nothing else happens" do
    :rand.seed(:exsss, {4, 5, 6})

    for _ <- 1..3000 do
      assert match?({:ok, _}, result = JSON.decode(:rand.bytes(:rand.uniform(12)))) or result == {:error, :invalid}
    end
  end

  test "white space may stand around a text" do
    assert JSON.decode(" \t\r\n{ \"a\" : 1 } \n") == {:ok, %{"a" => 1}}
  end

  test "deep nesting is read and written" do
    deep = String.duplicate("[", 50_000) <> String.duplicate("]", 50_000)
    assert {:ok, term} = JSON.decode(deep)
    assert JSON.canonical(term) == deep
  end

  test "a number of more digits than Python takes is refused wherever it stands, and at once" do
    most = String.duplicate("9", 4300)

    for before <- [
          "",
          "-",
          "[1,",
          "[\"a\\\"\",",
          ~s({"\\\\":),
          String.duplicate(" ", 4299),
          String.duplicate("[0,", 1433)
        ] do
      closing = closing(before)
      assert {:ok, _} = JSON.decode(before <> most <> closing)
      assert JSON.decode(before <> most <> "1" <> closing) == {:error, :invalid}
    end

    # Ten million of them would take hours to convert.
    assert JSON.decode("[" <> String.duplicate("1234567890", 1_000_000) <> "]") == {:error, :invalid}
    assert JSON.decode("0." <> String.duplicate("1", 100_000)) == {:error, :invalid}

    number = Integer.pow(10, 4300) - 1
    assert JSON.canonical([number, -number]) == "[#{number},-#{number}]"
    assert_raise ArgumentError, ~r/4300 digits/, fn -> JSON.encode!([number + 1]) end
    assert_raise ArgumentError, ~r/4300 digits/, fn -> JSON.encode!(%{"a" => -number - 1}) end
  end

  defp closing(before) do
    open = before |> String.replace(~r/"(\\.|[^"\\])*"/, "") |> String.graphemes()
    for char <- Enum.reverse(open), char in ["[", "{"], into: "", do: if(char == "[", do: "]", else: "}")
  end

  test "digits in a text are a text, however many" do
    for digits <- [4300, 4301, 10_000, 100_000], around <- ["", "\"", "\\", "é"] do
      text = around <> String.duplicate("7", digits) <> around
      written = JSON.canonical(%{text => [text, 1]})
      assert JSON.decode(written) == {:ok, %{text => [text, 1]}}
    end
  end

  test "of members with the same name the last one counts" do
    assert JSON.decode(~s({"a": 1, "b": 2, "a": 3})) == {:ok, %{"a" => 3, "b" => 2}}
  end

  test "a string that is kept keeps no message alive" do
    kept = String.duplicate("k", 100)
    {:ok, %{"value" => value}} = JSON.decode(~s({"value": "#{kept}", "rest": "#{String.duplicate("r", 100_000)}"}))
    assert value == kept
    assert :binary.referenced_byte_size(value) < 1000
  end

  test "what JSON lacks is refused" do
    for term <- [
          :atom,
          :null,
          {1, 2},
          self(),
          fn -> 1 end,
          ~D[2024-02-29],
          %{a: 1},
          %{1 => 2},
          %{nil => 2},
          <<255>>,
          <<0xED, 0xA0, 0x80>>,
          "é" |> binary_part(0, 1),
          <<1::3>>,
          [1 | 2],
          [1, [2 | :x]],
          %{"a" => %{"b" => [{}]}},
          %{<<255>> => 1}
        ] do
      assert_raise ArgumentError, ~r/^JSON has no room for/, fn -> JSON.encode!(term) end
      assert_raise ArgumentError, ~r/^JSON has no room for/, fn -> JSON.canonical(term) end
    end
  end

  defp term(0), do: scalar()

  defp term(depth) do
    case :rand.uniform(4) do
      1 -> for _ <- 1..:rand.uniform(4), do: term(depth - 1)
      2 -> Map.new(1..:rand.uniform(40), fn _ -> {text(), term((depth - 2) |> max(0))} end)
      3 -> if :rand.uniform(2) == 1, do: [], else: %{}
      4 -> scalar()
    end
  end

  defp scalar do
    case :rand.uniform(6) do
      1 -> nil
      2 -> :rand.uniform(2) == 1
      3 -> :rand.uniform(1_000_000) - 500_000
      4 -> Enum.random([-1, 1]) * Integer.pow(:rand.uniform(9), :rand.uniform(200))
      5 -> (:rand.uniform() - 0.5) * :math.pow(10, :rand.uniform(600) - 300)
      6 -> text()
    end
  end

  defp text do
    chars = [?a, ?", ?\\, ?/, 0, 7, ?\n, 0x1F, 0x7F, ?é, 0x2028, 0xFFFD, 0x1F600]
    List.to_string(for _ <- 1..(:rand.uniform(12) - 1)//1, do: Enum.random(chars))
  end
end
