defmodule Bridge.Gen.Names do
  @moduledoc false
  # Owns how a Python name becomes an Elixir identifier, and that no two become the same.

  # What cannot be, or had better not be, the name of a function or a variable: words of the language, its special forms,
  # the macros that every module imports, and what the compiler defines in each module.
  @reserved MapSet.new(
              ~w(true false nil when and or not in fn do end catch rescue after else module_info behaviour_info) ++
                for({name, _} <- Kernel.SpecialForms.__info__(:macros) ++ Kernel.__info__(:macros), do: to_string(name))
            )

  @doc "An identifier for a Python name: `__call__` is `call`, `toDict` is `to_dict`, `end` is `end_`."
  @spec identifier(String.t()) :: String.t()
  def identifier(name) do
    plain =
      name
      |> Macro.underscore()
      |> String.replace(~r/[^a-z0-9_]+/, "_")
      |> String.trim("_")
      |> String.slice(0, 100)

    cond do
      plain == "" -> "unnamed"
      plain =~ ~r/\A[0-9]/ -> "n" <> plain
      MapSet.member?(@reserved, plain) -> plain <> "_"
      true -> plain
    end
  end

  @doc "`fun.(identifier, item)` for each item that has a `name`; one that is taken gets a number."
  @spec unique([map()], [String.t()], (String.t(), map() -> result)) :: [result] when result: term()
  def unique(items, taken, fun) do
    {named, _taken} =
      Enum.map_reduce(items, MapSet.new(taken), fn item, taken ->
        name = item["name"] |> identifier() |> free(taken)
        {fun.(name, item), MapSet.put(taken, name)}
      end)

    named
  end

  defp free(name, taken) do
    if MapSet.member?(taken, name) do
      Enum.find_value(2..(MapSet.size(taken) + 2), fn n ->
        candidate = "#{name}_#{n}"
        if not MapSet.member?(taken, candidate), do: candidate
      end)
    else
      name
    end
  end
end
