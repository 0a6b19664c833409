defmodule Bridge.Value.Kinds do
  # The kinds of tagged values, and the members that each must and may have, in the order in which they are written.
  @moduledoc false

  alias Bridge.Value.Fault

  @moment ~w(zone offset_us name fold)
  @kinds %{
    "int" => {~w(hex), []},
    "float" => {~w(value), []},
    "complex" => {~w(real imag), []},
    "decimal" => {~w(value), []},
    "bytes" => {[], ~w(base64 buffer)},
    "bytearray" => {[], ~w(base64 buffer)},
    "date" => {~w(value), []},
    "time" => {~w(value), @moment},
    "datetime" => {~w(value), @moment},
    "timedelta" => {~w(days seconds microseconds), []},
    "uuid" => {~w(value), []},
    "tuple" => {~w(items), []},
    "set" => {~w(items), []},
    "frozenset" => {~w(items), []},
    "map" => {~w(items), []},
    "dict" => {~w(value), []},
    "ndarray" => {~w(dtype shape order buffer), []},
    "npscalar" => {~w(dtype), ~w(base64 text)},
    "table" => {~w(library buffer), ~w(type name freq)},
    "dataclass" => {~w(class fields), []},
    "pydantic" => {~w(class fields fields_set), ~w(extra private)},
    "namedtuple" => {~w(class fields), []},
    "enum" => {~w(class name), []},
    "record" => {~w(class fields), []},
    "ref" => {~w(id), ~w(class version)},
    "tool" => {~w(name), ~w(description schema)},
    "variable" => {~w(name), []}
  }

  @spec names() :: [String.t()]
  def names, do: Map.keys(@kinds)

  @doc "The names of an object's members, in the order in which writers put them."
  @spec member_order(map()) :: [String.t()]
  def member_order(%{"$bridge" => kind} = tree) when is_map_key(@kinds, kind) do
    {required, optional} = Map.fetch!(@kinds, kind)
    known = ["$bridge" | required ++ optional]
    Enum.filter(known, &is_map_key(tree, &1)) ++ Enum.sort(Map.keys(tree) -- known)
  end

  def member_order(tree), do: tree |> Map.keys() |> Enum.sort()

  @doc "Throws the fault of a tag whose kind there is not, or whose members are not those of its kind."
  @spec check(map(), Fault.path()) :: :ok
  def check(%{"$bridge" => kind} = tree, path) do
    case @kinds do
      %{^kind => {required, optional}} -> check_members(tree, required, optional, path)
      _ -> unknown(kind, path)
    end
  end

  defp check_members(tree, required, optional, path) do
    missing = Enum.reject(required, &is_map_key(tree, &1))
    present = Enum.count(optional, &is_map_key(tree, &1))

    cond do
      missing != [] ->
        Fault.malformed(path, "a #{inspect(tree["$bridge"])} lacks #{Enum.join(missing, ", ")}")

      map_size(tree) > 1 + length(required) + present ->
        extra = Map.keys(tree) -- ["$bridge" | required ++ optional]
        names = extra |> Enum.sort() |> Enum.take(8) |> Enum.map_join(", ", &inner_step/1)
        Fault.malformed(path, "a #{inspect(tree["$bridge"])} must not have #{names}")

      true ->
        :ok
    end
  end

  @spec unknown(term(), Fault.path()) :: no_return()
  defp unknown(kind, path) do
    Fault.malformed(path, "there is no kind #{inner_step(kind)} of value", "Is the other side newer than this one?")
  end

  defp inner_step(key), do: key |> Fault.key_step() |> String.slice(1..-2//1)

  @doc "A member of a tag, which must be of that type."
  @spec member(map(), String.t(), :string | :integer | :list | :object, Fault.path()) :: term()
  def member(tree, name, type, path) do
    case Map.fetch!(tree, name) do
      text when type == :string and is_binary(text) -> text
      number when type == :integer and is_integer(number) -> number
      items when type == :list and is_list(items) -> items
      object when type == :object and is_map(object) -> object
      _ -> Fault.malformed(path, "#{inspect(name)} of a #{inspect(tree["$bridge"])} must be #{article(type)}")
    end
  end

  @doc "As `member/4`, or nil if the tag does not have the member."
  @spec optional(map(), String.t(), :string | :integer | :list | :object, Fault.path()) :: term()
  def optional(tree, name, type, path) do
    if is_map_key(tree, name), do: member(tree, name, type, path)
  end

  defp article(type) when type in [:integer, :object], do: "an #{type}"
  defp article(type), do: "a #{type}"
end
