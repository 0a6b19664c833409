defmodule Bridge.Store.Exchange.Reader do
  @moduledoc false
  # What an exported file says, all of it checked, as the facts that make its sessions. A file is somebody else's: what
  # does not fit is refused with the place where it is, and makes nothing.

  alias Bridge.{Error, Value}
  alias Bridge.Store.{Plain, Types}

  @format "bridge.sessions"
  @version 1
  @max_count 9_223_372_036_854_775_807
  @remedy "Export it anew. Nothing was imported."

  # Each member: its name, the check it passes, whether it must be there, and what it is if it is not.
  @export [{"format", :text}, {"version", :count}, {"exported", :text}, {"bridge", :text}, {"sessions", :list}]
  @session [
    {"id", :name},
    {"created", :number},
    {"ttl", :positive_or_nil},
    {"version", :count},
    {"lm", :object_or_nil, nil},
    {"variables", :list, []},
    {"instances", :list, []},
    {"functions", :list, []},
    {"secrets", :texts, []},
    {"tools", :texts, []}
  ]
  @lm [{"model", :text}, {"api_base", :text_or_nil}, {"adapter", :text_or_nil}, {"options", :object}]
  @variable [{"name", :name}, {"schema", :object_or_nil}, {"current", :object_or_nil}, {"history", :list, []}]
  @version_of [
    {"version", :positive_count},
    {"at", :count},
    {"written", :number},
    {"value", :object_or_nil},
    {"restores", :count_or_nil, nil}
  ]
  @value [{"type", :text}, {"json", :any}, {"buffers", :texts, []}]
  @instance [
    {"ref", :name},
    {"name", :text},
    {"class", :name},
    {"args", :object},
    {"kwargs", :object},
    {"adapter", :adapter},
    {"state", :object},
    {"sha256", :text_or_nil},
    {"version", :positive_count},
    {"methods", :texts},
    {"cache", :positive_or_nil, nil}
  ]
  @function [
    {"name", :name},
    {"source", :text},
    {"sha256", :text},
    {"lm", :boolean, false},
    {"secrets", :texts, []},
    {"cache", :positive_or_nil, nil}
  ]

  @doc "The sessions of an export: `{id, facts}` of each. They count as used `now`."
  @spec read(binary(), atom(), integer()) :: {:ok, [{String.t(), [tuple()]}]} | {:error, Error.t()}
  def read(content, bridge, now) do
    sessions =
      content
      |> decoded()
      |> members("the export", @export)
      |> Map.fetch!("sessions")
      |> Enum.map(&session(&1, bridge, now))

    distinct!("session", for({id, _facts} <- sessions, do: id))
    {:ok, sessions}
  catch
    # What is found far inside a file ends its reading.
    {__MODULE__, error} -> {:error, error}
  end

  defp refuse(message, remedy \\ @remedy), do: throw({__MODULE__, Error.new(:store_damaged, message, remedy: remedy)})

  defp decoded(content) do
    case Bridge.JSON.decode(content) do
      {:ok, %{"format" => @format, "version" => @version} = export} ->
        export

      {:ok, %{"format" => @format, "version" => version}} when is_integer(version) ->
        refuse(
          "the export has version #{version}, this Bridge reads version #{@version}",
          "Import it with the Bridge that wrote it, or a newer one."
        )

      {:ok, %{"format" => format}} when is_binary(format) ->
        refuse("it is no export of sessions: its format is #{shown(format)}, not #{inspect(@format)}")

      {:ok, _other} ->
        refuse("it is no export of sessions: it says no format")

      {:error, :invalid} ->
        refuse("it is no export of sessions: it is no JSON")
    end
  end

  # -- its parts -------------------------------------------------------------------------------------------------------

  defp session(given, bridge, now) do
    it = members(given, "a session", @session)
    id = it["id"]
    where = "session #{shown(id)}"
    version = it["version"]

    variables = for variable <- it["variables"], do: variable(variable, id, version, bridge, where)
    instances = for instance <- it["instances"], do: instance(instance, id, bridge, where)
    functions = for function <- it["functions"], do: function(function, id, where)

    distinct!("variable of #{where}", for({name, _facts} <- variables, do: name))
    distinct!("instance of #{where}", for({:instance, _id, record} <- instances, do: record.ref))

    distinct!(
      "name of an instance of #{where}",
      for({:instance, _id, %{name: name}} <- instances, name != "", do: name)
    )

    distinct!("function of #{where}", for({:function, _id, function} <- functions, do: function.name))

    put = %{
      created: ms(it["created"]),
      used: now,
      ttl: it["ttl"] && max(ms(it["ttl"]), 1),
      version: version,
      lm: lm(it["lm"], where)
    }

    {id, [{:session, id, put} | Enum.flat_map(variables, &elem(&1, 1))] ++ instances ++ functions}
  end

  defp lm(nil, _where), do: nil

  defp lm(given, where) do
    it = members(given, "#{where}: its language model", @lm)
    %{model: it["model"], api_base: it["api_base"], adapter: it["adapter"], options: it["options"]}
  end

  defp variable(given, id, newest, bridge, where) do
    it = members(given, "#{where}: a variable", @variable)
    name = it["name"]
    where = "#{where}: variable #{shown(name)}"
    if it["history"] != [] and it["current"] == nil, do: refuse("#{where} has a history and no current version")
    puts = for version <- it["history"] ++ List.wrap(it["current"]), do: version(version, id, bridge, where)

    for {earlier, later} <- Enum.zip(puts, Enum.drop(puts, 1)),
        earlier.version >= later.version or earlier.at > later.at do
      refuse("#{where}: version #{later.version} comes after version #{earlier.version}")
    end

    if puts != [] and List.last(puts).at > newest do
      refuse("#{where} is of the session's version #{List.last(puts).at}, and the session is at #{newest}")
    end

    type =
      with schema when schema != nil <- it["schema"] do
        with {:error, error} <- Types.of_schema(schema),
             do: refuse("#{where}: its type cannot be used: #{error.message}")

        [{:type, id, name, schema}]
      end

    {name, List.wrap(type) ++ for(put <- puts, do: {:variable, id, name, put})}
  end

  defp version(given, id, bridge, where) do
    it = members(given, "#{where}: a version", @version_of)
    put = %{version: it["version"], at: it["at"], written: ms(it["written"]), restores: it["restores"]}

    case it["value"] do
      nil ->
        Map.merge(put, %{there: false, value: nil, type: nil, size: 0})

      given ->
        {value, type} = value(given, id, bridge, "#{where}, version #{put.version}")
        Map.merge(put, %{there: true, value: value, type: type, size: :erlang.external_size(value)})
    end
  end

  defp value(given, id, bridge, where) do
    it = members(given, where, @value)

    buffers =
      for text <- it["buffers"] do
        case Base.decode64(text) do
          {:ok, bytes} -> bytes
          :error -> refuse("#{where}: a buffer is no base64")
        end
      end

    case Value.decode(it["json"], buffers, path: where, hook: Plain.hook(bridge, id)) do
      {:ok, value} -> {value, it["type"]}
      {:error, error} -> refuse(error.message)
    end
  end

  defp instance(given, id, bridge, where) do
    it = members(given, "#{where}: an instance", @instance)
    where = "#{where}: instance #{shown(it["ref"])}"
    {args, _type} = value(it["args"], id, bridge, "#{where}, args")
    {kwargs, _type} = value(it["kwargs"], id, bridge, "#{where}, kwargs")
    {state, _type} = value(it["state"], id, bridge, "#{where}, state")

    unless is_list(args) and is_map(kwargs) and not is_struct(kwargs) and Enum.all?(Map.keys(kwargs), &is_binary/1) do
      refuse("#{where}: its arguments are no list and no object")
    end

    if it["adapter"] == "pickle" and not (is_struct(state, Bridge.Bytes) and sha256(state.data) == it["sha256"]) do
      refuse("#{where}: its pickled state is not what its digest says")
    end

    record = %{
      ref: it["ref"],
      name: it["name"],
      class: it["class"],
      args: args,
      kwargs: kwargs,
      state: %{adapter: it["adapter"], value: state, sha256: it["sha256"]},
      version: it["version"],
      methods: it["methods"],
      cache: it["cache"]
    }

    {:instance, id, record}
  end

  defp function(given, id, where) do
    it = members(given, "#{where}: a function", @function)

    if sha256(it["source"]) != it["sha256"] do
      refuse("#{where}: the source of the function #{shown(it["name"])} is not what its digest says")
    end

    function = %{
      name: it["name"],
      source: it["source"],
      hash: it["sha256"],
      lm: it["lm"],
      secrets: it["secrets"],
      cache: it["cache"]
    }

    {:function, id, function}
  end

  defp sha256(bytes), do: Base.encode16(:crypto.hash(:sha256, bytes), case: :lower)
  defp ms(seconds), do: round(seconds * 1000)

  # -- members ---------------------------------------------------------------------------------------------------------

  defp members(%{} = given, where, members) do
    names = Enum.map(members, &elem(&1, 0))

    case Map.keys(given) -- names do
      [] -> :ok
      [unknown | _] -> refuse("#{where} has a member #{shown(unknown)}, which is not of this format")
    end

    for member <- members, into: %{} do
      name = elem(member, 0)

      value =
        case {given, member} do
          {%{^name => value}, _member} -> value
          {_without, {_name, _check, default}} -> default
          {_without, _required} -> refuse("#{where} has no #{name}")
        end

      unless fits?(elem(member, 1), value), do: refuse("#{where}: its #{name} is no such thing: #{shown(value)}")
      {name, value}
    end
  end

  defp members(_given, where, _members), do: refuse("#{where} is no object")

  defp fits?(:any, _value), do: true
  defp fits?(:text, value), do: is_binary(value)
  defp fits?(:text_or_nil, value), do: value == nil or is_binary(value)
  defp fits?(:name, value), do: is_binary(value) and value != ""
  defp fits?(:texts, value), do: is_list(value) and Enum.all?(value, &is_binary/1)
  defp fits?(:list, value), do: is_list(value)
  defp fits?(:object, value), do: is_map(value)
  defp fits?(:object_or_nil, value), do: value == nil or is_map(value)
  defp fits?(:boolean, value), do: is_boolean(value)
  # Milliseconds of it are to be a whole number of a sensible size.
  defp fits?(:number, value), do: is_number(value) and abs(value) < 1.0e15
  defp fits?(:positive_or_nil, value), do: value == nil or (fits?(:number, value) and value > 0)
  defp fits?(:count, value), do: is_integer(value) and value >= 0 and value <= @max_count
  defp fits?(:count_or_nil, value), do: value == nil or (is_integer(value) and abs(value) <= @max_count)
  defp fits?(:positive_count, value), do: fits?(:count, value) and value > 0
  defp fits?(:adapter, value), do: value in ["dspy", "bridge", "pickle", "recipe"]

  defp distinct!(kind, names) do
    case names -- Enum.uniq(names) do
      [] -> :ok
      [twice | _] -> refuse("the export has the #{kind} #{shown(twice)} twice")
    end
  end

  defp shown(value), do: inspect(value, limit: 5, printable_limit: 60)
end
