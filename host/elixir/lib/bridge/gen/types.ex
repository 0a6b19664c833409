defmodule Bridge.Gen.Types do
  @moduledoc false
  # Owns how a Python annotation, which is text, becomes an Elixir type. What it does not know is `term()`: nothing of the
  # text itself gets into the source.

  @plain %{
    "str" => "String.t()",
    "int" => "integer()",
    "float" => "number()",
    "bool" => "boolean()",
    "None" => "nil",
    "bytes" => "Bridge.Bytes.t()",
    "list" => "list()",
    "List" => "list()",
    "dict" => "map()",
    "Dict" => "map()",
    "tuple" => "tuple()",
    "set" => "MapSet.t()",
    "datetime.date" => "Date.t()"
  }
  @lists ~w(list List Sequence Iterable)
  @max_depth 8
  @max_text 1_000

  @doc "The type of values with this annotation."
  @spec of(String.t() | nil) :: String.t()
  def of(annotation) when annotation in [nil, ""], do: "term()"
  def of(annotation) when byte_size(annotation) > @max_text, do: "term()"
  def of(annotation), do: type(annotation, 0)

  defp type(_text, @max_depth), do: "term()"

  defp type(text, depth) do
    text = text |> String.trim() |> String.trim("'") |> String.trim("\"") |> unqualified()

    case split(text, "|") do
      [one] -> single(one, depth)
      several -> several |> Enum.map(&type(&1, depth + 1)) |> union()
    end
  end

  defp single(text, depth) do
    case Regex.run(~r/\A(\w+)\[(.*)\]\z/su, text) do
      [_, "Optional", inside] -> union([type(inside, depth + 1), "nil"])
      [_, "Union", inside] -> inside |> split(",") |> Enum.map(&type(&1, depth + 1)) |> union()
      [_, name, inside] when name in @lists -> "[#{type(inside, depth + 1)}]"
      [_, name, _inside] -> Map.get(@plain, name, "term()")
      nil -> Map.get(@plain, text, "term()")
    end
  end

  defp unqualified(text), do: String.replace(text, ~r/\A(typing|collections\.abc)\./, "")

  # `term()` has room for all the others.
  defp union(types), do: if("term()" in types, do: "term()", else: types |> Enum.uniq() |> Enum.join(" | "))

  # At this separator, but not within brackets.
  defp split(text, separator) do
    {parts, last, _depth} =
      text
      |> String.graphemes()
      |> Enum.reduce({[], [], 0}, fn
        ^separator, {parts, part, 0} -> {[part | parts], [], 0}
        "[" = char, {parts, part, depth} -> {parts, [char | part], depth + 1}
        "]" = char, {parts, part, depth} -> {parts, [char | part], depth - 1}
        char, {parts, part, depth} -> {parts, [char | part], depth}
      end)

    [last | parts] |> Enum.reverse() |> Enum.map(&(&1 |> Enum.reverse() |> Enum.join() |> String.trim()))
  end
end
