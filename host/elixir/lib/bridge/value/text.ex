defmodule Bridge.Value.Text do
  # Text as values have it: whether a binary is UTF-8, the compact JSON that sets are sorted by, and names for messages.
  @moduledoc false

  alias Bridge.Value.Kinds

  @doc "Whether a binary is UTF-8."
  @spec valid?(binary()) :: boolean()
  # In C, where `String.valid?/1` is Elixir.
  def valid?(text), do: :unicode.characters_to_binary(text) === text

  @doc "The compact JSON of a tree, members of a kind in the order of the kind, others by name."
  @spec compact(term()) :: binary()
  def compact(tree), do: tree |> json() |> IO.iodata_to_binary()

  defp json(nil), do: "null"
  defp json(flag) when is_boolean(flag), do: Atom.to_string(flag)
  defp json(number) when is_integer(number), do: Integer.to_string(number)
  defp json(number) when is_float(number), do: number |> Float.to_string() |> String.replace(".0e", "e")
  defp json(text) when is_binary(text), do: [?", escaped(text, []), ?"]
  defp json(items) when is_list(items), do: [?[, items |> Enum.map(&json/1) |> Enum.intersperse(?,), ?]]

  defp json(%{} = tree) do
    members = for name <- Kinds.member_order(tree), do: [json(name), ?:, json(Map.fetch!(tree, name))]
    [?{, Enum.intersperse(members, ?,), ?}]
  end

  defp escaped(<<>>, done), do: Enum.reverse(done)
  defp escaped(<<?", rest::binary>>, done), do: escaped(rest, ["\\\"" | done])
  defp escaped(<<?\\, rest::binary>>, done), do: escaped(rest, ["\\\\" | done])
  defp escaped(<<?\n, rest::binary>>, done), do: escaped(rest, ["\\n" | done])
  defp escaped(<<?\r, rest::binary>>, done), do: escaped(rest, ["\\r" | done])
  defp escaped(<<?\t, rest::binary>>, done), do: escaped(rest, ["\\t" | done])
  defp escaped(<<?\b, rest::binary>>, done), do: escaped(rest, ["\\b" | done])
  defp escaped(<<?\f, rest::binary>>, done), do: escaped(rest, ["\\f" | done])

  defp escaped(<<control, rest::binary>>, done) when control < 32 do
    escaped(rest, ["\\u00" <> Base.encode16(<<control>>, case: :lower) | done])
  end

  defp escaped(<<char, rest::binary>>, done), do: escaped(rest, [char | done])

  @doc "What a term is, in a word."
  @spec kind(term()) :: String.t()
  def kind(nil), do: "nil"
  def kind(term) when is_boolean(term), do: "boolean"
  def kind(%module{}), do: inspect(module)
  def kind(term) when is_atom(term), do: "atom"
  def kind(term) when is_binary(term), do: "string"
  def kind(term) when is_integer(term), do: "integer"
  def kind(term) when is_float(term), do: "float"
  def kind(term) when is_list(term), do: "list"
  def kind(term) when is_map(term), do: "map"
  def kind(term) when is_tuple(term), do: "tuple"
  def kind(term) when is_function(term), do: "function"
  def kind(term) when is_pid(term), do: "pid"
  def kind(term) when is_reference(term), do: "reference"
  def kind(term) when is_port(term), do: "port"
  def kind(term) when is_bitstring(term), do: "bitstring"
end
