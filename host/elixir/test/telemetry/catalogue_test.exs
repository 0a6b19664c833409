defmodule Bridge.Telemetry.CatalogueTest do
  use ExUnit.Case, async: true

  alias Bridge.Telemetry.Catalogue

  doctest Catalogue

  @schema Path.expand("../../../../docs/telemetry.schema.json", __DIR__)
  @units %{
    ns: "ns",
    epoch_ns: "ns since the epoch",
    bytes: "bytes",
    count: "count",
    tokens: "tokens",
    usd: "USD",
    one: "1"
  }

  test "the catalogue has the events of docs/telemetry.schema.json, in every particular" do
    {:ok, schema} = Bridge.JSON.decode(File.read!(@schema))
    expected = Map.new(schema["oneOf"], &{&1["title"], as_told(&1)})
    ours = Map.new(Catalogue.events(), &{Enum.join(&1.name, "."), as_known(&1)})

    assert map_size(expected) >= 60
    assert Enum.sort(Map.keys(ours)) == Enum.sort(Map.keys(expected))
    for {title, told} <- expected, do: assert({title, ours[title]} == {title, told})
  end

  defp as_told(%{"properties" => %{"measurements" => measurements, "metadata" => metadata}} = event) do
    %{
      description: event["description"],
      open: measurements["additionalProperties"] != false,
      measurements:
        Map.new(measurements["properties"], fn {name, said} ->
          [_, unit] = Regex.run(~r/Unit: (.*)\.$/, said["description"])
          {name, {unit, name not in measurements["required"]}}
        end),
      metadata:
        Map.new(metadata["properties"], fn {name, said} ->
          {name, {said["type"], name not in metadata["required"]}}
        end)
    }
  end

  defp as_known(event) do
    %{
      description: "#{event.says} Emitted by: #{event.by}.",
      open: event.open,
      measurements:
        Map.new(event.measurements, fn {name, one} -> {to_string(name), {@units[one.unit], one.optional}} end),
      metadata:
        Map.new(event.metadata, fn {name, one} ->
          kind = Atom.to_string(one.kind)
          {to_string(name), {if(one.nullable, do: [kind, "null"], else: kind), one.optional}}
        end)
    }
  end

  @run %{
    "command" => "function.call",
    "subject" => "total",
    "session" => "s",
    "kernel" => "k",
    "attempt" => 1,
    "trace_id" => "t",
    "span_id" => "p",
    "parent_span_id" => nil
  }

  test "what a kernel tells has atoms for what the catalogue knows, and native durations" do
    said = Map.merge(@run, %{"success" => true, "error" => nil})

    assert {:ok, [:bridge, :execution, :stop], %{duration: native, callbacks: 2},
            %{success: true, error: nil, kernel: "k"}} =
             Catalogue.from_kernel(["bridge", "execution", "stop"], %{"duration" => 5_000, "callbacks" => 2}, said)

    assert System.convert_time_unit(native, :native, :nanosecond) == 5_000
  end

  test "a user's own members keep the texts of their names, and Bridge's own are not theirs to change" do
    assert {:ok, [:bridge, :user], %{"rows" => 3},
            %{"colour" => "red", "name" => "mine", name: "rows read", session: "s"}} =
             Catalogue.from_kernel(
               ["bridge", "user", "rows read"],
               %{"rows" => 3},
               Map.merge(@run, %{"colour" => "red", "name" => "mine", "nested" => %{}})
             )
  end

  test "no name that comes from a kernel becomes an atom" do
    name = "never_an_atom_#{System.unique_integer([:positive])}"
    assert :unknown = Catalogue.from_kernel(["bridge", name], %{name => 1}, @run)
    assert {:ok, _, %{^name => 1}, %{name: ^name}} = Catalogue.from_kernel(["bridge", "user", name], %{name => 1}, @run)
    span = Map.merge(@run, %{"name" => name, name => "x"})

    assert {:ok, _, _, %{^name => "x"}} =
             Catalogue.from_kernel(["bridge", "span", "start"], %{"system_time" => 1}, span)

    assert_raise ArgumentError, fn -> String.to_existing_atom(name) end
  end

  test "what no kernel can have measured is refused" do
    stop = ["bridge", "execution", "stop"]
    ended = Map.merge(@run, %{"success" => true, "error" => nil})

    for {name, numbers, said} <- [
          {["bridge", "kernel", "stop"], %{"duration" => 1}, @run},
          {stop, %{}, ended},
          {stop, %{"duration" => -1}, ended},
          {stop, %{"duration" => 5.0e30}, ended},
          {stop, %{"duration" => "long"}, ended},
          {stop, %{"duration" => 1}, Map.delete(ended, "kernel")},
          {stop, %{"duration" => 1}, %{ended | "success" => "yes"}},
          {stop, %{"duration" => 1}, %{ended | "session" => nil}}
        ] do
      assert {name, numbers, :refused} == {name, numbers, Catalogue.from_kernel(name, numbers, said)}
    end
  end

  # Events by chance, whole and damaged, and whether the Python host takes them for a kernel's.
  @python """
  import json, random
  from bridge_kernel.contract.catalogue import EVENTS, from_kernel
  from bridge_kernel.contract.telemetry import Event
  chance = random.Random(7)
  values = {"string": "x", "integer": 3, "boolean": True}
  odd = ["x", "", 3, -1, 2.5, True, None]
  cases = []
  for known in list(EVENTS.values()) * 40:
      name = tuple("mine" if word == "*" else word for word in known.name)
      numbers = {m: chance.choice([0, 1, 7, 2.5, 2**62]) for m, one in known.measurements.items() if not one.optional or chance.random() < 0.5}
      said = {m: values[one.kind] for m, one in known.metadata.items() if not one.optional or chance.random() < 0.5}
      for members, odds in ((numbers, [-1, 2**62 + 1, 1e300, -0.5]), (said, odd)):
          if members and chance.random() < 0.4:
              victim = chance.choice(sorted(members))
              if chance.random() < 0.5:
                  del members[victim]
              else:
                  members[victim] = chance.choice(odds)
      cases.append([name, numbers, said, from_kernel(Event(name, numbers, said))])
  print(json.dumps(cases))
  """

  test "what is taken for a kernel's is what the Python host takes for one" do
    {printed, 0} = System.cmd(Bridge.TestKernels.python(), ["-c", @python])
    {:ok, cases} = Bridge.JSON.decode(printed)

    taken =
      for [name, numbers, said, taken?] <- cases do
        found = Catalogue.from_kernel(name, numbers, said)
        assert {name, numbers, said, taken?} == {name, numbers, said, match?({:ok, _, _, _}, found)}
        refute found == :unknown
        taken?
      end

    assert Enum.count(taken, & &1) > 300
    assert Enum.count(taken, &(not &1)) > 300
  end

  test "all that Bridge itself says of an event is in it, under the catalogue's own names" do
    for event <- Catalogue.events(), event.by != :host, event.name != [:bridge, :user, :*] do
      values = %{string: "x", integer: 3, boolean: true}
      numbers = Map.new(event.measurements, fn {name, _} -> {name, 5} end)
      said = Map.new(event.metadata, fn {name, one} -> {name, values[one.kind]} end)
      wire = &Map.new(&1, fn {name, value} -> {Atom.to_string(name), value} end)
      name = Enum.map(event.name, &Atom.to_string/1)
      assert {:ok, event.name, numbers, said} == Catalogue.from_kernel(name, wire.(numbers), wire.(said))
      assert Catalogue.problem(event.name, numbers, said) == nil
    end
  end

  test "the beginning of a name stands for all events that have it" do
    assert [:bridge, :dspy, :lm, :stop] in Catalogue.matching([:bridge, :dspy])
    assert [:bridge, :user] in Catalogue.matching([])
    refute [:bridge, :user, :*] in Catalogue.matching([])
    assert Catalogue.matching([:my, :own]) == [[:my, :own]]
  end
end
