defmodule Bridge.Private do
  @moduledoc false
  # What a process says of itself in a crash report, or when it is asked: who it is, and of the message that it failed on
  # which one it was. Not what they hold: there are other people's values in them, and secrets.

  @doc "For `format_status/1` of a process."
  @spec status(map(), term()) :: map()
  def status(status, label) do
    Map.new(status, fn
      {:state, _state} -> {:state, label}
      {:message, message} -> {:message, tag(message)}
      {:log, _events} -> {:log, []}
      other -> other
    end)
  end

  defp tag({name, content}) when name in [:"$gen_call", :"$gen_cast"], do: {name, tag(content)}
  defp tag({name, from, content}) when name == :"$gen_call", do: {name, from, tag(content)}
  defp tag(message) when is_tuple(message) and tuple_size(message) > 0, do: tag(elem(message, 0))
  defp tag(name) when is_atom(name) or is_reference(name) or is_port(name), do: name
  defp tag(_content), do: :_

  @doc "How a process ended, as `Exception.format_exit/1` says it, but for the arguments of calls: they are values."
  @spec format_exit(term()) :: String.t()
  def format_exit({reason, {module, function, arguments}})
      when is_atom(module) and is_atom(function) and is_list(arguments) do
    "exited in: #{Exception.format_mfa(module, function, length(arguments))}\n    ** (EXIT) #{format_exit(reason)}"
  end

  def format_exit({reason, [_ | _] = stacktrace}), do: Exception.format_exit({reason, without_arguments(stacktrace)})
  def format_exit(reason), do: Exception.format_exit(reason)

  @doc "A stacktrace that names functions by their arity alone."
  @spec without_arguments(Exception.stacktrace()) :: Exception.stacktrace()
  def without_arguments(stacktrace) do
    Enum.map(stacktrace, fn
      {module, function, arguments, location} when is_list(arguments) ->
        {module, function, length(arguments), location}

      {fun, arguments, location} when is_list(arguments) ->
        {fun, length(arguments), location}

      other ->
        other
    end)
  end
end
