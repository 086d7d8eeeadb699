"""The words that a text states its writer's number with, by language; reading.py says what each list is for.

Every entry is a regular expression of alternatives, in lower case.
"""

from __future__ import annotations

from typing import NamedTuple


class Words(NamedTuple):
    """What is looked for in one language.

    Attributes:
        states: What states the writer's own number of now, and is followed by it: "i choose", "my number is".
        labels: What may stand before a colon and the number.
        final: What states a number that counts where an earlier statement differs.
        so: What a conclusion begins with, after which a statement counts whatever was said before.
        turn: What another clause of the writer's own begins with, after which it counts unless an "if" stands before.
        now: What may stand before a statement without changing it.
        because: What an explanation begins with, which may name any number.
        back: What takes a number back, or may do so.
        stated: What follows the number, and states it: "を選びます".
        comma: Whether 33,5 is a number.
    """

    states: str
    labels: str
    final: str
    so: str
    turn: str
    now: str
    because: str
    back: str
    stated: str = "(?!)"
    comma: bool = True


LANGUAGES = {
    "en": Words(
        states=r"i(?:'ll| will| would|'d| shall| now| therefore| finally| hereby| personally| just| again| still)*"
        r" (?:choose|pick|say|guess|answer|select|go (?:with|for)|give|take|submit|play|opt for|settle (?:on|for)|name"
        r"|enter|propose|decide on|stick (?:with|to)|stay (?:with|at)|keep)"
        r"|i(?:'m| am)(?: now| therefore| just)? (?:going (?:to (?:choose|pick|say|guess|select|go with|give|answer)"
        r"|with|for)|choosing|picking|selecting|guessing|submitting|sticking with|settling (?:on|for))"
        r"|i(?:'ve| have) (?:chosen|picked|selected|decided (?:on|to (?:choose|pick|go with|say))|settled on)"
        r"|i (?:think|guess|believe) i(?:'ll| will|'d| would|'m going to)? (?:choose|pick|say|guess|go (?:with|for))"
        r"|i(?:'d| would) (?:like to|rather) (?:choose|pick|say|guess|go with|submit)|let(?:'s| me) go with"
        r"|my (?:own |final |chosen |new |secret |best )*(?:number|answer|choice|guess|pick|response|decision|bid|best)"
        r"(?: for (?:this|the current) round| for the number| this (?:time|round)| now)? (?:is|will be|would be"
        r"|remains)|the (?:answer|number|best (?:number|choice|guess|answer)) is"
        r"|the number (?:that )?i(?:'ll| will| would)? (?:choose|pick|give|submit)(?: now)? is",
        labels=r"(?:my |the |your |here is my |here's my |here is a |here's a )?(?:own |chosen |selected )?(?:number"
        r"|answer|choice|guess|pick"
        r"|response|decision|selection)|assistant|me|(?:my number (?:for|in) )?this round",
        final="(?:so |thus )?(?:my |the )?(?:final|definitive) (?:answer|number|choice|decision|guess|pick)(?: is)?",
        so="so|and so|therefore|and therefore|thus|hence|consequently|accordingly|that's why|for that reason"
        "|which is why",
        turn="and|but|this time|now|finally|on reflection|instead",
        now="ok(?:ay)?|well|sure|alright|all right|yes|right|great|again|(?:in |for )?this round"
        r"|(?:in|for) round \d{1,4}|(?:in|for) (?:the|this) \d{1,4}(?:st|nd|rd|th) round|ultimately|in the end"
        r"|overall|in conclusion|then"
        "|to conclude|personally|myself|for me|today|after (?:some |careful )?(?:thought|thinking|consideration)",
        because=r"because|since|final\b|i (?:think|guess|believe|suppose)$|as (?!many|much)|given|considering"
        r"|based on|being|i\.?e\.?|why\?|reason\w*|my reasoning"
        "|(?:the )?reason|explanation|rationale|justification|here's why|here is why|which is|confidence"
        "|(?:this|that|it) is (?:because|based on|about|roughly|exactly|approximately|2/3|1/2|two[- ]thirds|half|my)"
        "|(?:the|last|previous) (?:last |previous |expected )?average|(?:in the )?(?:last|previous) (?:round|time)"
        "|assuming|if (?:the|all|every|most|others|people)|(?:some|most|many) (?:players|people|others|will)|rounded"
        "|2/3|two[- ]thirds|half of|=|≈|a naive|others (?:may|will|might|could|said)"
        "|i (?:expect|think|assume|believe|estimate|predict) (?:that )?(?:the|most|many|others|everyone|people|an)",
        back=r"wait|hm+|actually|scratch|correct(?:ion|ed|ing)|oops|no(?=[,.!:;]|$)|nope|nah|second thoughts?"
        r"|chang\w+ my"
        "|too (?:high|low|big|small|large|risky)|let me (?:re|think|try|change)|never ?mind|re-?(?:consider|think"
        "|vis)\\w*"
        "|not sure|unsure|instead(?! of)|forget|ignore|disregard|or (?:maybe|perhaps|even|rather|lower|higher)|maybe"
        "|perhaps|mistake|wrong"
        "|but (?:i|if|then|no|wait|since|what|others|they|everyone)\\b|if not|(?:that|this|it|which)(?:'s| is) what"
        "|is what"
        "|i (?:mean|meant|take|should|could|might|was|used|changed)|better|rather|joking|kidding|question|not really"
        "|i lied|[(](?:for )?(?:the )?(?:others?|them|they|theirs?|players?|average|everyone|example)|sorry|unless",
        comma=False,
    ),
    "de": Words(
        states="ich (?:wähle|nehme|sage|tippe(?: auf)?|rate|gebe|setze(?: auf)?|antworte(?: mit)?|bleibe bei"
        "|entscheide mich(?: jetzt| nun)? für)(?: daher| also| deshalb| jetzt| nun)?|(?:wähle|nehme|sage|tippe|rate"
        "|setze|entscheide) ich(?: jetzt| nun)?"
        "(?: mich)?(?: auf| für)?|(?:meine|die) (?:finale |gewählte )?(?:zahl|antwort|wahl|entscheidung|schätzung)"
        " (?:ist|lautet)|mein (?:tipp|vorschlag) (?:ist|lautet)",
        labels="(?:meine )?(?:zahl|antwort|wahl)",
        final="(?:meine |die )?endgültige (?:antwort|zahl|wahl)(?: ist| lautet)?",
        so="also|daher|deshalb|deswegen|darum|folglich|somit",
        turn="und|aber|diesmal|dieses mal|jetzt|nun",
        now="gut|na gut|in dieser runde|dann",
        because="weil|denn|da |begründung|erklärung|grund|wenn (?:alle|die)|der (?:durchschnitt|mittelwert)",
        back="moment|warte|nein|halt,|eigentlich|lieber|korrektur|zu (?:hoch|niedrig)|besser|oder|doch",
    ),
    "fr": Words(
        states="je (?:choisis|prends|dis|propose|réponds|opte pour|joue|donne|mise sur|sélectionne"
        "|vais (?:choisir|prendre|dire|jouer))(?: donc| finalement| alors)?|(?:mon (?:nombre|choix|chiffre|numéro)"
        "|(?:ma|la) (?:réponse|proposition|décision))"
        "(?: finale?)? (?:est|sera)(?: :)?",
        labels="(?:mon |ma |le )?(?:nombre|réponse|choix)",
        final="(?:ma )?réponse (?:finale|définitive)(?: est)?",
        so="donc|par conséquent|c'est pourquoi",
        turn="alors|et|mais|cette fois(?:-ci)?|maintenant",
        now="bon|finalement|d'accord|(?:à|pour) ce tour",
        because="parce que|car |puisque|comme|explication|raison|si (?:tout|la moyenne|les autres)|la moyenne",
        back="attend(?:s|ez)|non\\b|en fait|plutôt|pardon|trop (?:haut|bas|élevé)|mieux|ou (?:peut-être|bien)",
    ),
    "es": Words(
        states="(?:yo )?(?:elijo|escojo|digo|opto por|selecciono|me quedo con|voy (?:a (?:elegir|escoger)|con)|elegiré"
        "|propongo|respondo)|(?:mi (?:número|elección|apuesta|decisión)|(?:mi|la) respuesta) (?:es|será)",
        labels="(?:mi |el )?(?:número|respuesta|elección)",
        final="(?:mi )?respuesta final(?: es)?",
        so="así que|por eso|por lo tanto|por tanto",
        turn="entonces|y|pero|esta vez|ahora",
        now="bien|bueno|en esta ronda|no elijo [^,;]*(?=[,;])",
        because="porque|ya que|pues|explicación|motivo|razón|si (?:todos|el promedio|los demás)|el promedio|la media",
        back="espera|no,|mejor|en realidad|perdón|demasiado|o (?:quizás?|tal vez)",
    ),
    "it": Words(
        states="(?:io )?(?:scelgo|dico|prendo|opto per|seleziono|propongo|punto su|gioco|rispondo|sceglierò|sceglierei)"
        "|(?:il )?mio numero(?: finale)? (?:è|sarà)|(?:(?:la )?mia (?:risposta|scelta|proposta)|la risposta) (?:è"
        "|sarà)",
        labels="(?:il mio |la mia )?(?:numero|risposta|scelta)",
        final="(?:la mia )?risposta finale(?: è)?",
        so="quindi|perciò|pertanto|dunque",
        turn="e|ma|stavolta|questa volta|ora|adesso",
        now="bene|allora|in questo turno|non scelgo [^,;]*(?=[,;])",
        because="perché|poiché|dato che|spiegazione|motivo|se (?:tutti|la media)|la media",
        back="aspetta|no,|anzi|in realtà|scusa|meglio|troppo|o (?:forse|magari)",
    ),
    "pt": Words(
        states="(?:eu )?(?:escolho|digo|opto por|seleciono|fico com|vou (?:escolher|de|com)|aposto em|proponho"
        "|respondo)"
        "|(?:o )?meu número(?: final)? (?:é|será)|(?:(?:a )?minha (?:resposta|escolha)|a resposta) (?:é|será)",
        labels="(?:o meu |a minha )?(?:número|resposta|escolha)",
        final="(?:a minha )?resposta final(?: é)?",
        so="por isso|portanto|logo",
        turn="então|e|mas|desta vez|agora",
        now="bem|bom|nesta rodada|não escolho [^,;]*(?=[,;])",
        because="porque|pois|já que|explicação|motivo|se (?:todos|a média)|a média",
        back="espera|não\\b|na verdade|melhor|aliás|desculp\\w+|demais|ou talvez",
    ),
    "nl": Words(
        states="ik (?:kies(?: voor)?|neem|zeg|ga voor|gok(?: op)?|antwoord)|(?:kies|neem|zeg) ik(?: nu)?(?: voor)?"
        "|mijn (?:getal|nummer|antwoord|keuze) is",
        labels="(?:mijn )?(?:getal|antwoord|keuze)",
        final="(?:mijn )?(?:definitie(?:f|ve)|uiteindelijke) antwoord(?: is)?",
        so="dus|daarom",
        turn="en|maar|deze keer|nu",
        now="goed|in deze ronde",
        because="omdat|want|aangezien|uitleg|als (?:iedereen|het gemiddelde)|het gemiddelde",
        back="wacht|nee\\b|eigenlijk|liever|te (?:hoog|laag)|beter|of misschien|toch",
    ),
    "pl": Words(
        states="(?:ja )?(?:wybieram|podaję|mówię|biorę|stawiam(?: na)?|typuję)"
        "|(?:moja (?:liczba|odpowiedź|decyzja)|mój (?:wybór|numer|typ))(?: to| jest)",
        labels="(?:moja )?(?:liczba|odpowiedź)",
        final="(?:moja )?ostateczna odpowiedź(?: to)?",
        so="więc|dlatego|zatem",
        turn="i|ale|tym razem|teraz",
        now="dobrze|w tej rundzie",
        because="ponieważ|bo |gdyż|uzasadnienie|jeśli (?:wszyscy|średnia)|średnia",
        back="czekaj|nie,|właściwie|jednak|zaraz|lepiej|albo|lub",
    ),
    "ru": Words(
        states="(?:я )?(?:выбираю|беру|называю|загадываю|ставлю(?: на)?|выберу|отвечаю|говорю|предлагаю|бы выбрал[а]?)"
        "|мо[йеё] (?:число|ответ|выбор|номер)(?: это| будет)?(?: —| –| -)?",
        labels="(?:мо[йеё] )?(?:число|ответ|выбор)",
        final="(?:мой )?(?:окончательный|итоговый) ответ",
        so="поэтому|значит|так что|следовательно|итак",
        turn="и|но|в этот раз|на этот раз|теперь|сейчас",
        now="хорошо|в этом раунде",
        because="потому|так как|поскольку|объяснение|пояснение|если (?:все|среднее)|среднее",
        back="нет\\b|подожди\\w*|стоп|лучше|точнее|впрочем|хотя|на самом деле|вернее|или",
    ),
    "uk": Words(
        states="(?:я )?(?:обираю|вибираю|називаю)|(?:моє число|моя відповідь|мій вибір)(?: це)?(?: —| –| -)?",
        labels="(?:моє )?число|(?:моя )?відповідь",
        final="остаточна відповідь",
        so="тому|отже",
        turn="і|але|цього разу|тепер",
        now="добре|у цьому раунді",
        because="бо |тому що|оскільки",
        back="ні,|зачекай\\w*|краще|або|насправді",
    ),
    "tr": Words(
        states="seçtiğim sayı|(?:benim )?(?:sayım|cevabım|seçimim|tahminim|yanıtım)",
        stated=r"(?:'\w{1,3})? (?:sayısını )?(?:seçiyorum|diyorum|seçerim)",
        labels="(?:benim )?(?:sayım|cevabım|sayı|cevap|yanıt|tahminim|seçimim)",
        final="(?:nihai|son) (?:cevap|cevabım|yanıt)",
        so="bu yüzden|bu nedenle|o yüzden",
        turn="ve|ama|bu turda|bu sefer|bu kez|şimdi",
        now="tamam",
        because="çünkü|açıklama|eğer|ortalama",
        back="hayır|dur\\b|aslında|bekle|daha iyi|ya da|yok",
    ),
    "sv, da, no": Words(
        states="jag (?:väljer|säger|tar|gissar på)|(?:väljer|säger|tar) jag|jeg (?:vælger|velger|siger|sier|tager|tar)"
        "|(?:vælger|velger) jeg|mitt? (?:tal|tall|nummer|svar|val|valg) (?:är|er|blir)",
        labels="(?:mitt? )?(?:tal|svar|val|tall|valg)",
        final="slutgiltigt svar|endeligt? svar",
        so="därför|derfor",
        turn="och|og|men|den här gången|den här omgången|denne gang|nu|nå",
        now="okej",
        because="eftersom|för att|fordi|genomsnittet",
        back="nej\\b|nei\\b|vänta|vent\\b|egentlig\\w*|faktisk|hellre|heller|eller",
    ),
    "id": Words(
        states="saya (?:akan )?(?:memilih|pilih)|(?:angka|jawaban|pilihan|nomor) saya adalah",
        labels="(?:angka|jawaban|pilihan)(?: saya)?",
        final="jawaban akhir(?: saya)?",
        so="jadi|oleh karena itu",
        turn="dan|tapi|kali ini|sekarang",
        now="baik",
        because="karena|sebab|jika (?:semua|rata)",
        back="tunggu|tidak,|sebenarnya|lebih baik|atau|eh\\b",
    ),
    "vi": Words(
        states="tôi (?:sẽ )?chọn|(?:số|câu trả lời|lựa chọn|đáp án) của tôi là",
        labels="số|câu trả lời|đáp án",
        final="câu trả lời cuối cùng",
        so="vì vậy|nên|do đó",
        turn="và|nhưng|lần này|bây giờ",
        now="được rồi|vòng này",
        because="vì|bởi vì",
        back="khoan|không,|thực ra|hoặc|hay là",
    ),
    "zh": Words(
        states="(?:这次|这一轮|本轮|现在|這次|這一輪)?我(?:就|会|會|要|将|將)?"
        "(?:选择|選擇|选|選|猜|给出|報|报|出|决定选择|决定选)(?:的)?(?:数字|數字)?(?:是|为|為)?"
        "|(?:我的|我这一轮的|我這一輪的)?(?:数字|數字|答案|选择|選擇|回答)(?:是|为|為)",
        labels="(?:我的)?(?:数字|數字|答案|选择|選擇|回答)",
        final="(?:我的)?最[终終]答案(?:是|为|為)?",
        so="所以|因此|于是|於是",
        turn="但|这次|这一轮|本轮|这一次|現在|现在|這次",
        now="好的?|我不[选選][^,;。]*(?=[,;])",
        because="因为|因為|理由|原因|如果(?:大家|所有|平均)|平均",
        back="不对|不對|等等|等一下|其实|其實|还是|還是|不[,，]|更正|或",
        comma=False,
    ),
    "ja": Words(
        states="(?:私の)?(?:数字|答え|選択|回答)は",
        stated="を選びます|を選ぶ|を選択します|にします|に決めます|にする",
        labels="(?:私の)?(?:答え|数字|回答)",
        final="最終(?:的な)?(?:回答|答え)は?",
        so="ので|だから|なので|したがって|よって",
        turn="今回は",
        now="では|はい",
        because="なぜなら|理由|平均",
        back="いや|待って|やっぱり|訂正|実は|または|それとも",
        comma=False,
    ),
    "ko": Words(
        states="(?:제|저의|내|나의) (?:숫자|답|선택|대답|답변|번호)(?:은|는)",
        stated="번?(?:을|를|으로|로)? ?(?:선택합니다|선택하겠습니다|선택할게요|고르겠습니다"
        "|고릅니다|골라요|하겠습니다)",
        labels="(?:제 )?(?:답|숫자|정답|답변)",
        final="최종 (?:답변?|숫자)(?:은|는)?",
        so="므로|그래서|따라서|그러므로",
        turn="이번에는|이번엔",
        now="좋아요|네",
        because="왜냐하면|이유|지난 라운드|평균",
        back="아니|잠깐|사실은|정정|또는",
        comma=False,
    ),
    "ar": Words(
        states="(?:أنا )?(?:أختار|سأختار)|(?:رقمي|إجابتي|اختياري|جوابي)(?: هو| هي)?",
        labels="(?:الجواب|الإجابة|إجابتي|رقمي|الرقم)",
        final="الإجابة النهائية|الجواب النهائي",
        so="لذلك|لذا",
        turn="هذه المرة|الآن",
        now="حسنا",
        because="لأن|المتوسط",
        back="انتظر|في الواقع|بل |لا،|أو ",
        comma=False,
    ),
    "hi": Words(
        states="मेर[ाी] (?:उत्तर|नंबर|जवाब|चुनाव|संख्या|अंक)(?: है)?",
        stated=" (?:को )?(?:चुनता|चुनती|चुनूंगा|चुनूँगा|चुनूंगी|चुनूँगी)(?: हूँ| हूं)?",
        labels="(?:मेर[ाी] )?(?:उत्तर|जवाब|संख्या)",
        final="(?:मेरा )?अंतिम (?:उत्तर|जवाब)",
        so="इसलिए",
        turn="इस बार|इस दौर में|अब",
        now="ठीक है",
        because="क्योंकि|कारण|औसत",
        back="नहीं|रुक|या ",
        comma=False,
    ),
}
SUPPOSING = (  # where one of these stands before a conclusion, it may be none of the writer's own
    "suppose|wenn|falls|imagine|let's say|what if|hypothetical|for example|for instance|e\\.g\\."
    "|would (?:be thinking|say|think)"
    "|angenommen|zum beispiel|supposons|par exemple|supongamos|por ejemplo|supponiamo|ad esempio|suponhamos|por exemplo"
    "|stel dat|bijvoorbeeld|załóżmy|na przykład|допустим|например|diyelim|假设|假設|例如|もし|例えば"
    "|만약|예를 들어|لنفترض|मान लो"
)
THE_NUMBER = (  # what may stand between a statement and its number
    r"(?: ?(?:the (?:whole |same )?(?:number|value|integer)|a number|number|die(?: zahl)?|zahl|le(?: nombre"
    r"| chiffre)?|nombre"
    r"|el(?: número)?|número|il(?: numero)?|numero|o(?: número)?|het(?: getal)?|getal|liczbę|число|số|angka|talet"
    r"|tallet"
    r"|(?:ال)?(?:عدد|رقم)|数字|數字))?"
)
UNITS = r"(?: ?(?:%|points?|percent|€|\$|punkte|puntos|punti|pontos|点|分))?"
IFS = (  # where one of these stands before a clause, the clause may depend on it
    "if|when|unless|whether|wenn|falls|si|s'ils?|se|als|indien|jeśli|gdyby|jeżeli|если|якщо|eğer|om|hvis|jika|kalau"
    "|nếu|如果|若|もし|たら|만약|إذا|لو"
    "|अगर|यदि"
)
FOLLOWING = (  # what may follow a number that was stated, blank included, besides the end and an explanation
    "as my|for (?:this|round|now|the current|me)|in (?:this|round|the current)|this (?:time|round)|now|again|once more"
    "|to (?:win|be (?!the)|get|come|stay|match|maximi|try|beat|minimi)|hoping|believing|thinking|knowing|aiming"
    "|please|too|as well"
    "|so (?:that|as)|out of|with"
)
SUBJECT = (  # what may stand before the number that `stated` follows
    "(?:(?:ben|मैं(?: संख्या| नंबर)?|(?:私は|僕は|今回は|では)、?|(?:저는|나는|제가|이번에는)?(?: ?숫자)?) ?)?"
)
COPULA = "(?:です|だ|にします|とします| ?(?:입니다|이다|예요|이에요)| है)?"  # after a number that was stated
EXPLANATION = (  # a heading under which all is explanation
    "(?:here(?:'s| is) )?(?:my |the |some )?(?:reason(?:ing|s)?|explanation|rationale|justification)|why|begründung"
    "|erklärung"
    "|explication|raisonnement|explicación|razonamiento|spiegazione|ragionamento|explicação|raciocínio|uitleg"
    "|uzasadnienie"
    "|объяснение|пояснення|açıklama|förklaring|forklaring|penjelasan|giải thích|理由|原因|解释|이유|السبب|कारण"
)
